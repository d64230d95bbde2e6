"""Root-mean-square norm of rows (Zhang and Sennrich 2019), whose backward pass keeps its input.

    y = x r w,   r = 1 / sqrt(mean(x^2) + eps)
    dx = r (g - h mean(g h)),   dw = sum over rows of dy h,   with g = dy w and h = x r

On a GPU it is torch's: since 2.9 (pytorch pull request 153666) one kernel forward, and backward one
for dx beside those for dw. That is where weight and x have one dtype, as the models' have; else
torch warns and takes operations one by one. Norms of heads (Qwen 3) take the same kernels, a block
of threads a row however narrow; what that costs was not measured. On a CPU torch has no kernel, and
its operations one by one keep h besides x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import accumulation_dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        wide = dy.to(scale.dtype)
        dweight = (wide * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight
        dx = scale * (wide - normalised * (wide * normalised).mean(-1, keepdim=True))
        return dx.to(x.dtype), dweight, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return the normalised rows of x [..., n], in its dtype and fp32 within; weight [n]."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out
