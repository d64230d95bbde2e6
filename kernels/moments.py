"""Count, mean and sum of squared deviations [3]: statistics that merge exactly.

The parts of a union may be blocks of a kernel, sequences, micro-batches or ranks:

    n = sum n_i,   mean = sum n_i mean_i / n,   M2 = sum (M2_i + n_i (mean_i - mean)^2)

No sum of squares is formed, so a large mean costs no digits. (Chan, Golub, LeVeque 1979.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Whitening(NamedTuple):
    """What turns x into (x - mean) * rstd; 0-d device tensors."""

    mean: Tensor
    rstd: Tensor


@triton.jit
def block_moments(x, inside, count):
    """(mean, sum of squared deviations) of the `count` elements of a block that are inside."""
    mean = tl.sum(tl.where(inside, x, 0.0)) / tl.maximum(count, 1.0)
    deviation = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def merge_block_moments(count, mean, squares):
    """(mean, sum of squared deviations) of the union of parts, one part a lane."""
    center = tl.sum(count * mean) / tl.maximum(tl.sum(count), 1.0)
    return center, tl.sum(squares + count * (mean - center) * (mean - center))


def masked_moments(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """[..., 3] moments of x where the mask holds, along a dimension."""
    count = mask.sum(dim).to(x.dtype)
    mean = torch.where(mask, x, 0).sum(dim) / count.clamp(min=1)
    deviation = torch.where(mask, x - mean.unsqueeze(dim), 0)
    return torch.stack((count, mean, deviation.square().sum(dim)), dim=-1)


def merge_moments(moments: Tensor) -> Tensor:
    """[3] of a union from [N, 3] of its N parts, in fp64 and in row order."""
    count, mean, squares = moments.double().unbind(-1)
    total = count.sum()
    center = (count * mean).sum() / total.clamp(min=1)
    spread = (squares + count * (mean - center).square()).sum()
    return torch.stack((total, center, spread)).to(moments.dtype)


def whitening(moments: Tensor) -> Whitening:
    """The whitening of values with these [3] moments, by the unbiased variance plus 1e-8.

    Fewer than two values have no variance and are left as they are.
    """
    count, mean, squares = moments.unbind(-1)
    rstd = torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)
    return Whitening(torch.where(count >= 2, mean, 0), torch.where(count >= 2, rstd, 1))
