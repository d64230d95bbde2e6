"""Layer norm: fp32 statistics, deterministic weight gradients.

    n = (x - mean(x)) / sqrt(var(x) + eps)
    y = n * weight + bias

Backward, with g = dy * weight and means over the row:

    dx = (g - mean(g) - n mean(g n)) / sqrt(var + eps)
    dweight = sum over rows of dy n,   dbias = sum over rows of dy

The two sums are taken by a fixed number of programs over fixed rows, then over the programs. A
program holds them in its registers, which reaches to rows of 8192 columns: dy and x are read once
and dx is written, 6 bytes an element in bf16. Of wider rows a program has a part of the columns.
The two means of such a row are taken beforehand by a kernel that reads dy and x as well: 10 bytes.
At a width of 12288 the layer's matrix products should take over a hundred times as long as either:
72 H^2 operations a token at 790 TFLOP/s against 10 H bytes at 3 TB/s.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_WHOLE_ROW = 8192  # columns whose two sums fit the registers of a multiprocessor, beside the row
_PART = 4096  # columns of a wider row that a program of the backward pass has
_WARPS = 16  # on a multiprocessor in the backward pass; more of them leave more sums to add up


@triton.jit
def _forward_kernel(
    y,  # [rows, H]
    statistics,  # [2, rows] mean, 1 / standard deviation
    x,
    weight,
    bias,  # [H]
    eps,
    row_length,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < row_length
    at = row * row_length + column
    row_x = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    mean = tl.sum(row_x) / row_length
    centered = tl.where(inside, row_x - mean, 0.0)
    variance = tl.sum(centered * centered) / row_length
    rstd = 1.0 / tl.sqrt(variance + tl.cast(eps, ACC))
    w = tl.load(weight + column, mask=inside, other=0.0).to(ACC)
    b = tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    tl.store(y + at, centered * rstd * w + b, mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + tl.num_programs(0) + row, rstd)


@triton.jit
def _row_means(g, normed, row_length):
    """(mean(g), mean(g n)) of a row."""
    return tl.sum(g) / row_length, tl.sum(g * normed) / row_length


@triton.jit
def _means_kernel(
    means,  # [2, rows]
    dy,  # [rows, H]
    x,
    statistics,  # [2, rows]
    weight,
    row_length,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < row_length
    at = row * row_length + column
    mean = tl.load(statistics + row)
    rstd = tl.load(statistics + num_rows + row)
    g = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
    g *= tl.load(weight + column, mask=inside, other=0.0).to(ACC)
    normed = (tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean) * rstd
    g_mean, slope = _row_means(g, normed, row_length)
    tl.store(means + row, g_mean)
    tl.store(means + num_rows + row, slope)


@triton.jit
def _backward_kernel(
    dx,  # [rows, H]
    dweight,  # [programs, H]
    dbias,  # [programs, H]
    dy,
    x,
    statistics,  # [2, rows]
    means,  # [2, rows], or None where a block holds a whole row
    weight,
    num_rows,
    row_length,
    num_parts,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = (tl.program_id(0) // num_parts).to(tl.int64)
    num_programs = tl.num_programs(0) // num_parts
    column = tl.program_id(0) % num_parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < row_length
    weight_sum = tl.zeros((BLOCK,), ACC)
    bias_sum = tl.zeros((BLOCK,), ACC)
    for row in range(program, num_rows, num_programs):
        at = row * row_length + column
        mean = tl.load(statistics + row)
        rstd = tl.load(statistics + num_rows + row)
        upstream = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
        normed = (tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean) * rstd
        normed = tl.where(inside, normed, 0.0)
        weight_sum += upstream * normed
        bias_sum += upstream
        # Read again for each row: held across the loop, a wide weight costs the registers.
        g = upstream * tl.load(weight + column, mask=inside, other=0.0).to(ACC)
        if means is None:
            g_mean, slope = _row_means(g, normed, row_length)
        else:
            g_mean = tl.load(means + row)
            slope = tl.load(means + num_rows + row)
        tl.store(dx + at, rstd * (g - g_mean - normed * slope), mask=inside)
    tl.store(dweight + program * row_length + column, weight_sum, mask=inside)
    tl.store(dbias + program * row_length + column, bias_sum, mask=inside)


def _num_warps(block: int) -> int:
    """Wide rows take all the warps there are, or the weight's sums spill from the registers."""
    return 32 if block >= 8192 else num_warps_for(block)


def _backward_block(row_length: int) -> int:
    """Columns of a program of the backward pass: the whole row, or a part of it."""
    return next_power_of_2(row_length) if row_length <= _WHOLE_ROW else _PART


def _num_programs(rows: Tensor) -> int:
    """Programs that share the rows in the backward pass: they fill the device, however many rows
    there are."""
    if not rows.is_cuda:
        return 4
    block = _backward_block(rows.shape[1])
    multiprocessors = torch.cuda.get_device_properties(rows.device).multi_processor_count
    programs = multiprocessors * max(1, _WARPS // _num_warps(block))
    return max(1, programs // triton.cdiv(rows.shape[1], block))


@traced("trident::layer_norm")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, statistics [2, rows]) of x [rows, H]."""
    num_rows, row_length = x.shape
    dtype = accumulation_dtype(x.dtype)
    y = torch.empty_like(x)
    statistics = torch.empty(2, num_rows, dtype=dtype, device=x.device)
    block = next_power_of_2(row_length)
    if num_rows > 0:
        with torch.cuda.device_of(x):
            _forward_kernel[(num_rows,)](
                y,
                statistics,
                x,
                weight,
                bias,
                eps,
                row_length,
                ACC=triton_dtype(dtype),
                BLOCK=block,
                num_warps=_num_warps(block),
            )
    return y, statistics


@_layer_norm.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, len(x), dtype=accumulation_dtype(x.dtype))


@traced("trident::layer_norm_backward")
def _layer_norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [rows, H], dweight [programs, H], dbias [programs, H])."""
    num_rows, row_length = x.shape
    programs = _num_programs(x)
    dx = torch.empty_like(x)
    dweight = torch.empty(programs, row_length, dtype=statistics.dtype, device=x.device)
    dbias = torch.empty_like(dweight)
    acc, block = triton_dtype(statistics.dtype), _backward_block(row_length)
    num_parts = triton.cdiv(row_length, block)
    means = None if num_parts == 1 else torch.empty_like(statistics)
    with torch.cuda.device_of(x):
        if means is not None and num_rows > 0:
            whole = next_power_of_2(row_length)
            _means_kernel[(num_rows,)](
                means,
                dy,
                x,
                statistics,
                weight,
                row_length,
                ACC=acc,
                BLOCK=whole,
                num_warps=_num_warps(whole),
            )
        _backward_kernel[(programs * num_parts,)](
            dx,
            dweight,
            dbias,
            dy,
            x,
            statistics,
            means,
            weight,
            num_rows,
            row_length,
            num_parts,
            ACC=acc,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return dx, dweight, dbias


@_layer_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    partial = torch.empty(_num_programs(x), x.shape[1], dtype=statistics.dtype, device=x.device)
    return torch.empty_like(x), partial, torch.empty_like(partial)


class _LayerNorm(torch.autograd.Function):
    """(x, weight, bias) to y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, statistics = _layer_norm(rows, weight, bias, eps)
        ctx.save_for_backward(rows, statistics, weight)
        ctx.bias_dtype = bias.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight = ctx.saved_tensors
        rows = dy.reshape(x.shape).contiguous()
        dx, dweight, dbias = _layer_norm_backward(rows, x, statistics, weight)
        dweight, dbias = dweight.sum(0).to(weight.dtype), dbias.sum(0).to(ctx.bias_dtype)
        return dx.view(dy.shape), dweight, dbias, None


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """`layer_norm` in plain torch: the specification and the CPU path."""
    dtype = accumulation_dtype(x.dtype)
    row = (x.shape[-1],)
    return F.layer_norm(x.to(dtype), row, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Normalised rows of x in x's dtype.

    x [..., H]; weight, bias [H] of x's dtype or fp32. Differentiable in all three; the weights'
    gradients are summed over rows in a fixed order.
    """
    if not uses_triton(x):
        return layer_norm_reference(x, weight, bias, eps=eps)
    return _LayerNorm.apply(x, weight, bias, eps)
