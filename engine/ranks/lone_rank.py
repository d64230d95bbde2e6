"""The process group of a rank that is alone in it: what it would send, it has.

Most groups of a small run have one rank, and all of a run on one device. gloo takes each of their
collectives to a thread of its own, whose copies open an OpenMP team beside the main thread's:
libgomp then counts more threads than cores, lets waiting ones sleep, and every small parallel
operation costs more for the rest of the run (benchmarks.small_operations: 17 us instead of 7).
NCCL makes a communicator, with its memory, and launches a kernel. Here a collective is a copy, or
nothing.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

LONE = "lone"
"""The name of the backend, as init_process_group and new_group take it."""


class _Done(dist.Work):
    """Work that was finished when it was asked for."""

    def __init__(self, results: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._results = list(results)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def get_future(self) -> Future:
        future: Future = Future()
        future.set_result(self._results)
        return future


def _fill(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> _Done:
    """Copy inputs to outputs, those that do not lie there already (megatron's shards do)."""
    for output, source in zip(outputs, inputs, strict=True):
        if output.data_ptr() != source.data_ptr():
            output.detach().view(source.shape).copy_(source.detach())
    return _Done(outputs)


# Untyped: torch declares several forms of each of its methods, of which the callers use one.
_ProcessGroup: Any = dist.ProcessGroup


class LoneRank(_ProcessGroup):
    """All of torch.distributed's collectives, for the ranks [self].

    torch calls some by two names: the second is that of torch 2.13. To send to or to receive from
    another rank is an error, as there is none.
    """

    def __init__(self, rank: int, size: int) -> None:
        if size != 1:
            raise ValueError(f"a lone rank is one, got a group of {size}")
        super().__init__(rank, size)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the backend's name."""
        return LONE

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        """Leave the tensors as they are: their sum, their maximum, what rank 0 has."""
        return _Done(tensors)

    broadcast = reduce = allreduce_coalesced = allreduce

    def barrier(self, opts: Any = None) -> _Done:
        """Wait for nobody."""
        return _Done()

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        """Fill the only tensor of each list with its input."""
        return _fill([tensors[0] for tensors in outputs], inputs)

    gather = allgather

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        """Fill the only list with the inputs."""
        return _fill(outputs[0], inputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Done:
        """Fill each output with the only tensor of its list."""
        return _fill(outputs, [tensors[0] for tensors in inputs])

    reduce_scatter = scatter

    def _allgather_base(self, output: Tensor, source: Tensor, opts: Any = None) -> _Done:
        return _fill([output], [source])

    all_gather_single = _reduce_scatter_base = reduce_scatter_single = _allgather_base

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        """Fill each output with its input."""
        return _fill(outputs, inputs)

    all_gather_single_coalesced = reduce_scatter_tensor_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = alltoall = allgather_into_tensor_coalesced

    def alltoall_base(
        self, output: Tensor, source: Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> _Done:
        """Fill the output with the input."""
        return _fill([output], [source])

    all_to_all_single = alltoall_base

    def _start_coalescing(self, device: torch.device) -> None:
        pass

    def _end_coalescing(self, device: torch.device) -> _Done:
        return _Done()


def _make(store: dist.Store, rank: int, size: int, timeout: Any) -> LoneRank:
    return LoneRank(rank, size)


dist.Backend.register_backend(LONE, _make, devices=["cpu", "cuda"])


@contextlib.contextmanager
def lone_groups() -> Iterator[None]:
    """Run a block in which torch's new_group, whoever calls it, makes groups of one rank LoneRanks;
    all ranks run it together."""
    new_group: Any = dist.new_group

    @functools.wraps(new_group)
    def new(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        if ranks is not None and len(list(ranks)) == 1:
            backend = LONE
            options.pop("pg_options", None)  # another backend's
        return new_group(ranks, timeout=timeout, backend=backend, **options)

    dist.new_group = new  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.new_group = new_group
