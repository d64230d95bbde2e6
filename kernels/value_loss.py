"""PPO's clipped loss of the value function over packed tokens, forward and backward together.

    loss = sum over response tokens of 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)
           / num_tokens

Where the two branches tie, the unclipped one is taken. num_tokens counts the response tokens of the
whole minibatch, over all micro-batches and ranks. So losses and gradients add up to the same
numbers in every layout.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.moments import block_moments, masked_moments, merge_block_moments
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_BLOCK = 1024
"""Tokens of a program."""
_NUM_PARTIALS = 7
"""Numbers that a program leaves for the reduction."""
_NUM_SUMS = 7
"""Numbers that the reduction leaves for the caller beside the loss."""


class ValueLoss(NamedTuple):
    """Device tensors; loss and clip_fraction add up over micro-batches and ranks."""

    loss: Tensor
    """0-d, differentiable in the new values."""
    clip_fraction: Tensor
    """0-d share of tokens whose clipped branch is the larger one."""
    return_moments: Tensor
    """[3] of the returns, for `kernels.moments`."""
    error_moments: Tensor
    """[3] of return - value. With return_moments they give the explained variance."""


@triton.jit
def _clipped_token(value, old_value, target, cliprange):
    """(loss, derivative by the new value, is clipped) of each token."""
    near_old = tl.minimum(tl.maximum(value, old_value - cliprange), old_value + cliprange)
    unclipped = (value - target) * (value - target)
    clipped = (near_old - target) * (near_old - target)
    is_clipped = clipped > unclipped
    derivative = tl.where(is_clipped, 0.0, value - target)
    return 0.5 * tl.where(is_clipped, clipped, unclipped), derivative, is_clipped


@triton.jit
def _scale(token_count, ACC: tl.constexpr):
    return 1.0 / tl.maximum(tl.load(token_count).to(ACC), 1.0)


@triton.jit
def _loss_kernel(
    partials,  # [7, programs]
    derivatives,  # [T] out
    values,  # [T], as are the two after it
    old_values,
    returns,
    response_mask,  # [T]
    token_count,  # 0-d, of the whole minibatch
    cliprange,
    num_tokens,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    t = program * BLOCK + tl.arange(0, BLOCK)
    in_range = t < num_tokens
    inside = in_range & (tl.load(response_mask + t, mask=in_range, other=0) != 0)
    scale = _scale(token_count, ACC)
    count = tl.sum(inside.to(ACC))
    value = tl.load(values + t, mask=inside, other=0.0).to(ACC)
    old_value = tl.load(old_values + t, mask=inside, other=0.0).to(ACC)
    target = tl.load(returns + t, mask=inside, other=0.0).to(ACC)
    loss, derivative, is_clipped = _clipped_token(value, old_value, target, tl.cast(cliprange, ACC))
    tl.store(derivatives + t, derivative * scale, mask=in_range)
    part = partials + program
    row = tl.num_programs(0)
    tl.store(part, count)
    tl.store(part + row, tl.sum(loss))
    tl.store(part + 2 * row, tl.sum(is_clipped.to(ACC)))
    mean, squares = block_moments(target, inside, count)
    tl.store(part + 3 * row, mean)
    tl.store(part + 4 * row, squares)
    mean, squares = block_moments(target - value, inside, count)
    tl.store(part + 5 * row, mean)
    tl.store(part + 6 * row, squares)


@triton.jit
def _reduce_kernel(
    loss,  # 0-d out
    sums,  # [7] out: the other fields of ValueLoss
    partials,  # [7, programs]
    token_count,  # 0-d
    num_programs,
    ACC: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # One program adds up all partials: the number of tokens alone fixes the order.
    lane = tl.arange(0, PROGRAMS)
    inside = lane < num_programs
    part = partials + lane
    count = tl.load(part, mask=inside, other=0.0)
    total = tl.sum(count)
    scale = _scale(token_count, ACC)
    losses = tl.load(part + num_programs, mask=inside, other=0.0)
    tl.store(loss, tl.sum(losses) * scale)
    clipped = tl.load(part + 2 * num_programs, mask=inside, other=0.0)
    tl.store(sums, tl.sum(clipped) * scale)
    for i in tl.static_range(2):
        mean = tl.load(part + (3 + 2 * i) * num_programs, mask=inside, other=0.0)
        squares = tl.load(part + (4 + 2 * i) * num_programs, mask=inside, other=0.0)
        mean, squares = merge_block_moments(count, mean, squares)
        tl.store(sums + 1 + 3 * i, total)
        tl.store(sums + 2 + 3 * i, mean)
        tl.store(sums + 3 + 3 * i, squares)


@traced("trident::value_loss")
def _value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    cliprange: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, [7] sums, d loss / d values [T])."""
    dtype = accumulation_dtype(values.dtype)
    tokens = len(mask)
    programs = triton.cdiv(tokens, _BLOCK)
    loss, sums, partials, derivatives = (
        torch.empty(shape, dtype=dtype, device=mask.device)
        for shape in ((), _NUM_SUMS, (_NUM_PARTIALS, programs), tokens)
    )
    acc = triton_dtype(dtype)
    with torch.cuda.device_of(mask):
        if programs > 0:
            _loss_kernel[(programs,)](
                partials,
                derivatives,
                *(x.contiguous() for x in (values, old_values, returns, mask)),
                num_tokens,
                cliprange,
                tokens,
                ACC=acc,
                BLOCK=_BLOCK,
                num_warps=num_warps_for(_BLOCK),
            )
        _reduce_kernel[(1,)](
            loss,
            sums,
            partials,
            num_tokens,
            programs,
            ACC=acc,
            PROGRAMS=next_power_of_2(programs),
        )
    return loss, sums, derivatives


@_value_loss.register_fake
def _(values: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(values.dtype)
    return tuple(values.new_empty(shape, dtype=dtype) for shape in ((), _NUM_SUMS, len(values)))


class _ValueLoss(torch.autograd.Function):
    """Values to (loss, sums); keeps the derivatives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, sums, derivatives = _value_loss(values, *rest)
        ctx.save_for_backward(derivatives)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (derivatives,) = ctx.saved_tensors
        grad = None if upstream is None else (upstream * derivatives).to(ctx.dtype)
        return grad, None, None, None, None, None


def value_loss_reference(
    value: tuple[Tensor, Tensor, Tensor], mask: Tensor, num_tokens: Tensor, cliprange: float
) -> ValueLoss:
    """`value_loss` in plain torch: the specification and the CPU path.

    value holds values, old_values and returns, [T] each.
    """
    dtype = accumulation_dtype(value[0].dtype)
    new, old, target = (torch.where(mask, x.to(dtype), 0) for x in value)
    near_old = new.clamp(old - cliprange, old + cliprange)
    unclipped, clipped = (new - target).square(), (near_old - target).square()
    scale = 1 / num_tokens.to(dtype).clamp(min=1)
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() * scale
    with torch.no_grad():
        return ValueLoss(
            loss=loss,
            clip_fraction=(clipped > unclipped).sum() * scale,
            return_moments=masked_moments(target, mask),
            error_moments=masked_moments(target - new, mask),
        )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
) -> ValueLoss:
    """Clipped value loss, differentiable in `values`, and its metrics.

    values, old_values, returns [T]; mask [T] bool; num_tokens 0-d, the minibatch's count of
    response tokens over all micro-batches and ranks. A cliprange of `math.inf` is the plain squared
    error. Nothing outside the mask is read; zero tokens give zeros.
    """
    if not uses_triton(values):
        return value_loss_reference((values, old_values, returns), mask, num_tokens, cliprange)
    loss, sums = _ValueLoss.apply(values, old_values, returns, mask, num_tokens, cliprange)
    return ValueLoss(loss, sums[0], sums[1:4], sums[4:])
