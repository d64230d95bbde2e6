"""What a plan asks for that its cluster does not have: of what, where, and how much.

Imports neither torch nor megatron.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.planning.hardware import Cluster
from engine.planning.ranks import CacheRoom, RankMemory

Resource = Literal["GPU memory", "host memory", "key-value cache"]


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Something that a rank has too little of."""

    resource: Resource
    """Memory is in bytes; the cache is in tokens of one sequence."""
    stage: int
    """Pipeline stage of the rank, the policy's in PPO."""
    needed: int
    available: int

    @property
    def missing(self) -> int:
        """What is needed beyond what there is."""
        return self.needed - self.available


def misfits(ranks: Sequence[RankMemory], cache: CacheRoom | None, cluster: Cluster) -> list[Misfit]:
    """Return what does not fit: memory by stage, GPU's and host's, then the cache."""
    found = []
    for rank in ranks:
        memory: tuple[tuple[Resource, int, int], ...] = (
            ("GPU memory", rank.peak_bytes, cluster.free_bytes),
            ("host memory", rank.host_bytes, cluster.gpu.host_memory_bytes),
        )
        for resource, needed, available in memory:
            if needed > available:
                found.append(
                    Misfit(resource=resource, stage=rank.stage, needed=needed, available=available)
                )
    if cache is not None and cache.sequence_tokens > cache.tokens:
        found.append(
            Misfit(
                resource="key-value cache",
                stage=cache.stage,
                needed=cache.sequence_tokens,
                available=cache.tokens,
            )
        )
    return found
