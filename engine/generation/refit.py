"""Copies a network's weights into another parallel layout of the same ranks, for generation.

A pipeline generates slowly: every token passes all stages. Refit gives the same ranks a second
network of more tensor or data parallelism, filled through megatron-core's resharding plan. The copy
carries the version of the weights that it was made from, and generate() refuses one that is stale.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.resharding import reshard_model_weights
from megatron.core.resharding.copy_services.base import CopyService
from torch import Tensor

from engine.device import synchronize
from engine.network import Network, build_network
from engine.parallel import rearranged
from engine.residency.host import allocate, distinct_storages, release
from engine.residency.seat import weights_of
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics

_NEVER_FILLED = -1  # a version that no weights have


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """What one refit cost."""

    received_bytes: int
    """From other ranks, by the rank that received most; what a rank holds already is copied in
    place."""
    seconds: float
    """Of the slowest rank."""


class Refit:
    """A language model's copy in a generation layout. All ranks make it and call it together."""

    def __init__(self, source: Network, layout: ParallelLayout, *, numerics: Numerics) -> None:
        """numerics: of the source. Raises UserError for a layout that refit cannot fill."""
        source.parallel.layout.check_refit(layout)
        layout.check(source.size)
        self.source = source
        parallel = rearranged(source.parallel, layout)
        self.network = build_network("language", source.size, parallel, numerics=numerics)
        self.network.source = source
        self.report: RefitReport | None = None
        """Of the last refit."""
        self._storages = distinct_storages(weights_of(self.network))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self.release()

    @property
    def num_bytes(self) -> int:
        """The device memory that the copy takes now."""
        return sum(storage.nbytes() for storage in self._storages)

    @contextlib.contextmanager
    def filled(self) -> Iterator[Network]:
        """Run a block with the copy up to date, and give its memory up after it."""
        try:
            self()
            yield self.network
        finally:
            self.release()

    @torch.no_grad()
    def __call__(self) -> RefitReport:
        """Bring the copy up to date."""
        device = self.source.parallel.device
        synchronize(device)
        started = time.perf_counter()
        service = _Exchange()
        self.source.settle()
        if self.num_bytes == 0:
            allocate(self._storages, self._sizes)
        with self.source.parallel.active():
            reshard_model_weights(self.source.modules, self.network.modules, service)
        synchronize(device)
        self.network.weights_version = self.source.weights_version
        seconds = time.perf_counter() - started
        cost = torch.tensor([seconds, service.received_bytes], dtype=torch.float64, device=device)
        dist.all_reduce(cost, op=dist.ReduceOp.MAX)
        self.report = RefitReport(seconds=float(cost[0]), received_bytes=int(cost[1]))  # sync
        return self.report

    def release(self) -> None:
        """Give up the copy's memory; it is stale until the next refit."""
        release(self._storages)
        self.network.weights_version = _NEVER_FILLED


class _Exchange(CopyService):
    """The copies of one refit: within the rank by hand, between ranks in one batch of messages.

    megatron-core's own services want a CUDA stream, also for gloo. Both sides of a pair submit
    their messages in the order of the plan, so they match without tags.
    """

    def __init__(self) -> None:
        self.received_bytes = 0
        self._messages: list[dist.P2POp] = []
        self._local_sources: dict[int, Tensor] = {}
        self._local_targets: dict[int, Tensor] = {}

    def submit_send_with_id(self, task_id: int, src_tensor: Tensor, dest_rank: int) -> None:
        """Register a part of this rank's weights that another rank, or this one, wants."""
        if dest_rank == dist.get_rank():
            self._local_sources[task_id] = src_tensor
        else:
            self._messages.append(dist.P2POp(dist.isend, src_tensor, dest_rank))

    def submit_recv_with_id(self, task_id: int, dest_tensor: Tensor, src_rank: int) -> None:
        """Register a part that this rank wants, into a buffer that the plan copies from."""
        if src_rank == dist.get_rank():
            self._local_targets[task_id] = dest_tensor
        else:
            self._messages.append(dist.P2POp(dist.irecv, dest_tensor, src_rank))
            self.received_bytes += dest_tensor.nbytes

    def submit_send(self, src_tensor: Tensor, dest_rank: int) -> None:
        """Not called: the plan numbers its messages."""
        raise NotImplementedError

    def submit_recv(self, dest_tensor: Tensor, src_rank: int) -> None:
        """Not called: the plan numbers its messages."""
        raise NotImplementedError

    def run(self) -> None:
        """Carry all of it out."""
        for task_id, target in self._local_targets.items():
            target.copy_(self._local_sources[task_id])
        if self._messages:
            for work in dist.batch_isend_irecv(self._messages):
                work.wait()
