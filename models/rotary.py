"""Rotary positions (Su et al. 2021): queries and keys turn by an angle that grows with the token.

    (x_i, x_{i + r/2})  ->  rotated by  p * f_i,     f_i = base^(-2 i / r),  i < r / 2

where r is how many of a head's dimensions turn. Halves are paired, as GPT-NeoX and Llama have them.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rotate import rotate
from models.form import Rotary, RotaryScaling


@dataclass(frozen=True)
class Rotation:
    """The angles of a packed row's tokens."""

    cosines: Tensor
    """[T, 1, r / 2], in the dtype of queries and keys."""
    sines: Tensor
    """Likewise."""

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return both with the first r dimensions of their heads turned, in their shapes and dtype.

        query [T, heads, dim], or [T, kv_heads, heads / kv_heads, dim]; key [T, kv_heads, dim].
        """
        return rotate(query, key, self.cosines, self.sines)


def rotation_at(
    positions: Tensor, rotary: Rotary, head_dim: int, dtype: torch.dtype = torch.float32
) -> Rotation:
    """Return the rotation of tokens at positions [T] int64, for queries and keys of a dtype."""
    frequencies, factor = _frequencies(rotary, head_dim, positions.device)
    angles = positions[:, None, None].float() * frequencies
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


@functools.lru_cache(maxsize=64)
def _frequencies(rotary: Rotary, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """([r / 2] fp32 radians a token, what cosines and sines are multiplied by)."""
    turned = int(head_dim * rotary.fraction)
    exponents = torch.arange(0, turned, 2).float() / turned
    frequencies = 1.0 / rotary.base**exponents
    if rotary.scaling is None:
        return frequencies.to(device), 1.0
    frequencies = _SCALED[rotary.scaling.kind](frequencies, rotary.scaling, rotary.base)
    return frequencies.to(device), rotary.scaling.attention_factor


def _linear(frequencies: Tensor, scaling: RotaryScaling, base: float) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: RotaryScaling, base: float) -> Tensor:
    """As they are where a context has more than `high` turns (Llama 3.1's reference code).

    Divided by the factor where it has fewer than `low`, and between by their share.
    """
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, scaling: RotaryScaling, base: float) -> Tensor:
    """As _llama3, with a ramp over the frequency's number and not its turns (Peng et al. 2023,
    3.2), whose ends are whole numbers."""
    dim = 2 * len(frequencies)

    def number(turns: float) -> float:
        return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / 2 / math.log(base)

    first = max(math.floor(number(scaling.high)), 0)
    last = min(math.ceil(number(scaling.low)), dim - 1)
    steps = torch.arange(len(frequencies)).float()
    spread = ((steps - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * spread + frequencies * (1 - spread)


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
