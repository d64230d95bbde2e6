"""The noise of sampling: a function of (seed, sample, position, column or group), of nothing else.

    g = -log(-log(1 - u)),   u uniform in (0, 1)

u comes from Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (word, position,
sample index), its four outputs serving four neighbours:

    word = column // 4             for the columns, numbered over the whole vocabulary
    word = 2^30 + group // 4       for the groups of 8 columns: group = column // 8

A column's number fits an int32, so its word is below 2^29 and a group's in [2^30, 2^30 + 2^26): no
column shares a counter with a group, and their noises are independent.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(8)  # columns; a multiple of the four that share a counter
MAX_COLUMNS = 2**31 - 1
_GROUP_WORD = tl.constexpr(2**30)
assert _GROUP_WORD.value > MAX_COLUMNS // 4, "words of groups lie above those of columns"
assert _GROUP_WORD.value + MAX_COLUMNS // (4 * GROUP.value) < 2**31, "and fit an int32"
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
def _noise(seed, sample_index, position, words):
    """Noise of the four neighbours of each of words, in order."""
    zero = words * 0
    c1 = zero + position.to(tl.uint32)
    c2 = zero + (sample_index & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((sample_index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    b0, b1, b2, b3 = tl.philox(seed, words, c1, c2, c3)
    return _gumbel(tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3)))


@triton.jit
def group_noise(seed, sample_index, position, quads):
    """Noise of groups 4q to 4q+3 for each q in quads, in order."""
    return _noise(seed, sample_index, position, (quads + _GROUP_WORD).to(tl.uint32))


@triton.jit
def column_noise(seed, sample_index, position, quads):
    """Noise of columns 4q to 4q+3 for each q in quads, in order."""
    return _noise(seed, sample_index, position, quads.to(tl.uint32))


def philox(key: SampleKey, words: Tensor) -> tuple[Tensor, ...]:
    """Four [B, Q] int64 tensors of 32 random bits for the counters of words, [1, Q] or [B, Q]."""
    seed, sample_index, position = key
    # int64 holds a 32-bit word; a product of two words wraps at 64 bits and keeps its bit pattern.
    # All in six tensors that stay in the cache.
    shape = len(sample_index), words.shape[1]
    c0 = (words.to(torch.int64) & _MASK).expand(shape).clone()
    c1 = (position.to(torch.int64)[:, None] & _MASK).expand(shape).clone()
    c2 = (sample_index[:, None] & _MASK).expand(shape).clone()
    c3 = ((sample_index >> 32)[:, None] & _MASK).expand(shape).clone()
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = int(seed) & _MASK, int(seed) >> 32
    for _ in range(10):
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        # c1 and c3 are whole products of the round before: mask off their high words, and the sign.
        torch.bitwise_right_shift(p1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _log_survival(key: SampleKey, words: Tensor) -> Tensor:
    """[B, 4 Q] fp32 log(1 - u) of the four neighbours of each of words, [1, Q] or [B, Q]."""
    u = torch.empty(len(key.sample_index), words.shape[1], 4)
    for lane, bits in enumerate(philox(key, words)):
        u[:, :, lane] = bits
    # The steps of `_gumbel`, in place; the scale carries the sign.
    u.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return u.log1p_().flatten(1)


def group_log_survival(key: SampleKey, first_group: int, num_groups: int) -> Tensor:
    """[B, num_groups] fp32 log(1 - u) of the groups from first_group on: g = -log(-log(1 - u))."""
    first_quad = first_group // 4
    quads = torch.arange(first_quad, (first_group + num_groups + 3) // 4)[None]
    skip = first_group - 4 * first_quad
    return _log_survival(key, quads + _GROUP_WORD.value)[:, skip : skip + num_groups]


def column_log_survival(key: SampleKey, groups: Tensor) -> Tensor:
    """[B, 8] fp32 log(1 - u) of the columns of one group a row, groups [B, 1]."""
    quads = GROUP.value // 4
    return _log_survival(key, groups * quads + torch.arange(quads))
