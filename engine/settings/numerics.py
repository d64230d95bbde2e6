"""Dtype and recomputation of a network. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How the numbers of a network are held and computed."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Weights and activations; fp16 and bf16 keep fp32 masters in the optimizer (paper: fp16, app.
    C)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, selective (attention only) or full
    (every layer)."""
    gradient_accumulation_fusion: bool | None = None
    """Add the gradients of the layers' matrices to their fp32 sums within the matrix product, which
    spares rounding every micro-batch's to the weights' dtype; none: on GPUs."""
    deterministic: bool = False
    """The same run on the same GPUs gives the same bits: torch, attention's backward pass and NCCL
    add up in a fixed order, more slowly; what cannot ends the run. Our kernels always do, and on
    CPUs nothing changes. PPO needs sampling.cache_gib besides: memory that happens to be free
    would decide which responses are decoded side by side."""
    recheck_every: int = 0
    """Optimizer steps between two whose forward and backward passes are computed twice, which must
    agree to the last bit on every rank; 0: never. A number of a faulty chip so ends the run before
    it is applied. Our choice; wants deterministic, and costs such a step its passes again."""
    compare_every: int = 0
    """Optimizer steps between two before which ranks compare the weights that they hold alike, by
    their bits; so they do before a save then. 0: never. Our choice; reads the weights once."""

    def __post_init__(self) -> None:
        check_numbers(self, "numerics.", not_negative="recheck_every compare_every")
        if self.recheck_every and not self.deterministic:
            raise UserError(
                f"--numerics.recheck-every {self.recheck_every} wants --numerics.deterministic: "
                "without it sound passes differ in their last bits"
            )
