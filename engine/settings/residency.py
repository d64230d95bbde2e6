"""Which weights and optimizer state leave the GPU while nobody reads them. Imports neither torch
nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class ResidencyConfig:
    """Where the weights of PPO's four models and the optimizer state rest.

    Gradient buffers are given up during rollout and scoring, whatever is chosen here. All choices
    give the same numbers to the last bit. The papers say nothing of this.
    """

    reference: Literal["resident", "host", "sharded"] = "resident"
    """The reference's weights, read in scoring only. resident: on the GPU all the time. host: in
    pinned host memory, swapped into the policy's network to be read (into buffers of its own where
    its size is another). sharded: over the data-parallel ranks, gathered layer by layer."""
    reward_model: Literal["resident", "host", "sharded"] = "resident"
    """The reward model's weights, likewise; its partner is the critic."""
    critic: Literal["resident", "host"] = "resident"
    """The critic's weights. host: in pinned host memory while responses are generated."""
    optimizer: Literal["resident", "host"] = "resident"
    """fp32 masters, Adam's moments and the averaged weights of policy and critic. host: in pinned
    host memory except while they are updated."""
    bucket_mib: int = 64
    """MiB that one copy between GPU and host moves. Our choice: long enough for the link's full
    rate, short enough that the two directions of a swap overlap; a power of two wastes no pinned
    memory, whose allocations torch rounds up to one."""

    def __post_init__(self) -> None:
        check_numbers(self, "residency.", counts="bucket_mib")
