"""The gated activation of an MLP (Shazeer 2020): one read of its columns and one write.

    y = f(g) u,      g = gate + bias,   u = through + bias,   f: silu and others
    dg = dy u f'(g),   du = dy f(g),   dbias = sum over rows of dx

The columns of x [T, 2F] alternate: gate, through, gate, through. A program loads a run of them and
parts the pairs in its registers, so that nothing is read by every second column. Backward keeps x
alone, computes f again, and writes dx as it reads x.

Traffic in bf16, bytes an element of y, planned and not measured: 6 forward (4 read, 2 written) and
10 backward (6 read, 4 written). torch's operations one by one take 14 and 30: they read whole
memory lines for every second column, and write f(g), both parts' gradients, and these once more
when they interleave them. They also keep f(g). A bias adds 8 to their forward pass, here nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gelu import gelu
from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_BLOCK = 1024  # pairs of columns of a program: 16 bytes of bf16 a thread and load


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu,
    "gelu": F.gelu,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""The activations of MLPs, gated or not; the kernels know the same names."""


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """(f(x), f'(x)) of one of ACTIVATIONS."""
    if ACTIVATION == "relu":  # a NaN stays one; tl.maximum would drop it
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)  # 1 / sqrt(2)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        value, slope = x * share, share + x * density
    else:  # x sigmoid(v)
        if ACTIVATION == "gelu_tanh":  # 2 sqrt(2 / pi); kernels/gelu.py has the formula
            v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            v_slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        elif ACTIVATION == "quick_gelu":
            v, v_slope = 1.702 * x, 1.702
        else:
            tl.static_assert(ACTIVATION == "silu")
            v, v_slope = x, 1.0
        share = 1.0 / (1.0 + tl.exp(-v))
        value, slope = x * share, share + x * (share * (1.0 - share)) * v_slope
    return value, slope


@triton.jit
def _pairs(x, bias, at, column, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """(gates, throughs) [BLOCK] with their biases: x[at], of the columns below width."""
    inside = column < width
    columns = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        columns += tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    return tl.split(tl.reshape(columns, (BLOCK, 2)))


@triton.jit
def _forward_kernel(
    y,  # [T, F]
    x,  # [T, 2F]
    bias,  # [2F], or None
    num_pairs,
    num_parts,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // num_parts).to(tl.int64)
    first = tl.program_id(0) % num_parts * BLOCK
    column, pair = 2 * first + tl.arange(0, 2 * BLOCK), first + tl.arange(0, BLOCK)
    at = row * (2 * num_pairs) + column
    gate, through = _pairs(x, bias, at, column, 2 * num_pairs, ACC, BLOCK)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(y + row * num_pairs + pair, value * through, mask=pair < num_pairs)


@triton.jit
def _backward_kernel(
    dx,  # [T, 2F]
    dy,  # [T, F]
    x,  # [T, 2F]
    bias,  # [2F], or None
    num_pairs,
    num_parts,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // num_parts).to(tl.int64)
    first = tl.program_id(0) % num_parts * BLOCK
    column, pair = 2 * first + tl.arange(0, 2 * BLOCK), first + tl.arange(0, BLOCK)
    at = row * (2 * num_pairs) + column
    gate, through = _pairs(x, bias, at, column, 2 * num_pairs, ACC, BLOCK)
    value, slope = _value_and_slope(gate, ACTIVATION)
    upstream = tl.load(dy + row * num_pairs + pair, mask=pair < num_pairs, other=0.0).to(ACC)
    columns = tl.join(upstream * through * slope, upstream * value)
    tl.store(dx + at, tl.reshape(columns, (2 * BLOCK,)), mask=column < 2 * num_pairs)


def _launch(
    pair_kernel: Any, tensors: tuple[Tensor, ...], bias: Tensor | None, activation: str
) -> None:
    """Launch a kernel over the pairs of its last tensor, x [T, 2F]."""
    x = tensors[-1]
    num_rows, num_pairs = len(x), x.shape[1] // 2
    if num_rows == 0:
        return
    block = min(_BLOCK, next_power_of_2(num_pairs))
    num_parts = triton.cdiv(num_pairs, block)
    with torch.cuda.device_of(x):
        pair_kernel[(num_rows * num_parts,)](
            *tensors,
            bias,
            num_pairs,
            num_parts,
            ACTIVATION=activation,
            ACC=triton_dtype(accumulation_dtype(x.dtype)),
            BLOCK=block,
            num_warps=num_warps_for(2 * block),
        )


@traced("trident::gated")
def _gated(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y [T, F] of x [T, 2F]."""
    y = x.new_empty(len(x), x.shape[1] // 2)
    _launch(_forward_kernel, (y, x), bias, activation)
    return y


@_gated.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), x.shape[1] // 2)


@traced("trident::gated_backward")
def _gated_backward(dy: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """dx [T, 2F] of dy [T, F]."""
    dx = torch.empty_like(x)
    _launch(_backward_kernel, (dx, dy, x), bias, activation)
    return dx


@_gated_backward.register_fake
def _(dy: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


class _Gated(torch.autograd.Function):
    """(x, bias) to y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, bias)
        ctx.activation = activation
        return _gated(rows, bias, activation).view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = _gated_backward(rows, x, bias, ctx.activation)
        dbias = dx.sum(0).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return dx.view(*dy.shape[:-1], x.shape[1]), dbias, None


def gated_reference(x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """`gated` in plain torch: the specification and the CPU path."""
    x = x if bias is None else x + bias
    gate, through = x.unflatten(-1, (-1, 2)).unbind(-1)
    return ACTIVATIONS[activation](gate) * through


def gated(x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """[..., F] in x's dtype: the activation of the even columns times the odd ones.

    x [..., 2F]; activation: one of ACTIVATIONS; bias [2F], added to x. Differentiable in both.
    """
    if not uses_triton(x):
        return gated_reference(x, activation, bias)
    out: Tensor = _Gated.apply(x, bias, activation)
    return out
