"""This rank's place among the ranks in one layout."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from engine.settings.layout import ParallelLayout

# megatron's memory for gathered activations: one, whatever the layout.
SHARED_STATE = ("_GLOBAL_MEMORY_BUFFER", "_GLOBAL_SYMMETRIC_MEMORY_BUFFER")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place among the ranks in one layout, and the groups it talks in there."""

    layout: ParallelLayout
    device: torch.device
    seed: int
    rank: int
    world_size: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """The ranks that hold the same part of the model and of every row."""
    cp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    """The ranks that hold the same part of the model, dp and cp together: they reduce gradients and
    share the optimizer's state."""
    reply_group: dist.ProcessGroup
    """The ranks of pp_group again, for messages that wait for none of those there."""
    last_stage_rank: int
    """The global rank of this pipeline's last stage: the source of what only it computes."""
    state: dict[str, Any] = field(repr=False, compare=False)
    """The global variables that megatron finds its groups in."""

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes logs and files that are not sharded."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so computes losses."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def num_replicas(self) -> int:
        """Copies of the model: dp x cp."""
        return self.dp * self.layout.cp

    @property
    def replica_rank(self) -> int:
        """Which of them this rank is a part of."""
        return self.dp_rank * self.layout.cp + self.cp_rank

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run a block in which megatron sees this layout's groups.

        megatron looks its groups up in global variables, so whatever calls it on a network does so
        in a block of that network's layout. Blocks nest; all ranks of the layout enter together.
        """
        kept = megatron_state()
        vars(parallel_state).update(self.state)
        try:
            yield
        finally:
            vars(parallel_state).update(kept)


def megatron_state() -> dict[str, Any]:
    """Return megatron's global variables that depend on the layout."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name[1:].isupper() and name not in SHARED_STATE
    }
