"""Dtype and recomputation of a network. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal


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
    """The same run gives the same bits on GPUs too: torch and the attention's backward pass add up
    in a fixed order, more slowly. Our kernels always do, and on CPUs nothing changes."""
