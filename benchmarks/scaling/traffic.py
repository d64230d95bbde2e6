"""What ranks send one another: every collective and message that torch hands to a backend.

A collective is counted as the fewest bytes that a rank has to send for it. A ring reaches that,
with n ranks that hold S bytes: all-reduce 2 S (n - 1) / n; reduce-scatter (of S), all-gather (to S)
and all-to-all S (n - 1) / n; a broadcast, gather or scatter S (n - 1) / n, the whole shared among
the ranks. A message counts at its sender. Groups of one rank send nothing.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By c10d's name of an operation: which argument is the whole buffer, and how often a rank sends the
# (n - 1) / n of it that is not its own.
_COLLECTIVES = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "reduce_": (0, 1),
    "broadcast_": (0, 1),
    "allgather_": (0, 1),
    "_allgather_base_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "allgather_coalesced_": (0, 1),
    "gather_": (0, 1),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "scatter_": (1, 1),
    "alltoall_": (1, 1),
    "alltoall_base_": (1, 1),
    "barrier": (0, 0),
}
_RECEIVED = {"recv_", "recv_any_source_"}


class Traffic(TorchDispatchMode):
    """Within the block, counts what this thread sends, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0.0
        """Sent by this rank."""
        self.num_calls = 0
        """Collectives among several ranks, and messages sent."""
        self.num_alone = 0
        """Collectives in groups of one rank: of no use to anyone."""
        self.by_operation: dict[str, float] = defaultdict(float)
        """Bytes by c10d's name."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count an operation of c10d, and do it."""
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in _RECEIVED:
            return
        if name == "send":
            self._add(name, _num_bytes(args[0]))
            return
        if name not in _COLLECTIVES:
            raise RuntimeError(f"what does a rank send for c10d::{name}?")
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        num_ranks = dist.ProcessGroup.unbox(group).size()
        if num_ranks == 1:
            self.num_alone += 1
            return
        place, times = _COLLECTIVES[name]
        self._add(name, times * _num_bytes(args[place]) * (num_ranks - 1) / num_ranks)

    def _add(self, name: str, num_bytes: float) -> None:
        self.num_calls += 1
        self.num_bytes += num_bytes
        self.by_operation[name] += num_bytes


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_num_bytes(each) for each in value)
