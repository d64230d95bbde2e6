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
