"""The noise of sampling: a function of (seed, sample, position, column) and of nothing else.

    g = -log(-log(1 - u)),   u uniform in (0, 1)

u comes from Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (global column // 4,
position, sample index), its four outputs serving four columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class SampleKey(NamedTuple):
    """What the noise of a batch depends on. No two draws of a run may share all three."""

    seed: int | Tensor
    """In [0, 2^63), one a run; as a tensor [] int64 on the logits' device a CUDA graph reads it."""
    sample_index: Tensor
    """[B] int64 number of the sample within the run."""
    position: Tensor
    """[B] int number of the token within the sample."""


@triton.jit
def _gumbel(bits):
    """Noise from 32 random bits."""
    # In (0, 1): rounding never reaches 1, and 2^-33 at the small end keeps tokens rarer than 1e-9.
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    # -log(1 - u), by its series where 1 - u would round.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1 - u)))


@triton.jit
def row_noise(seed, sample_index, position, quads):
    """Noise of columns 4q to 4q+3 for each q in quads, in column order."""
    zero = quads * 0
    c1 = zero + position.to(tl.uint32)
    c2 = zero + (sample_index & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((sample_index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    b0, b1, b2, b3 = tl.philox(seed, quads, c1, c2, c3)
    return _gumbel(tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3)))


def philox(key: SampleKey, quads: Tensor) -> tuple[Tensor, ...]:
    """Four [B, Q] int64 tensors of 32 random bits for the columns 4q to 4q+3 of quads [Q]."""
    seed, sample_index, position = key
    # int64 holds a 32-bit word; a product of two words wraps at 64 bits and keeps its bit pattern.
    # [1, Q] and [B, 1] meet in the second round only, so the first costs next to nothing.
    c0 = quads.to(torch.int64)[None] & _MASK
    c1 = position.to(torch.int64)[:, None] & _MASK
    c2 = sample_index[:, None] & _MASK
    c3 = (sample_index >> 32)[:, None] & _MASK
    k0, k1 = int(seed) & _MASK, int(seed) >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 are whole products of the round before: mask off their high words, and the sign.
        c0 = (p1 >> 32).bitwise_xor(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def log_survival_reference(key: SampleKey, first_column: int, num_columns: int) -> Tensor:
    """[B, num_columns] fp32 log(1 - u) of the global columns from first_column on.

    The noise of a column is g = -log(-log(1 - u)).
    """
    first_quad = first_column // 4
    quads = torch.arange(first_quad, (first_column + num_columns + 3) // 4)
    u = torch.empty(len(key.sample_index), len(quads), 4)
    for lane, bits in enumerate(philox(key, quads)):
        u[:, :, lane] = bits
    # The steps of `_gumbel`, in place; the scale carries the sign.
    u.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    skip = first_column - 4 * first_quad
    return u.log1p_().flatten(1)[:, skip : skip + num_columns]
