"""Clipped policy and value losses of PPO over packed tokens, forward and backward together.

    policy loss = sum over response tokens of the policy's clipped loss / num_tokens
    value loss  = sum over response tokens of the value function's / num_tokens

with the losses of a token in clipped_loss.py. num_tokens counts the response tokens of the whole
minibatch over all micro-batches and ranks, so that losses and gradients add up to the same numbers
in every layout.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.clipped_loss import policy_branches, policy_token, value_branches, value_token
from kernels.gae import exp_remainder
from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.moments import Whitening, block_moments, masked_moments, merge_block_moments
from kernels.traced import traced

_BLOCK = 1024  # tokens a program
_NUM_PARTIALS = 13  # rows a program leaves for the reduction
_NUM_SUMS = 12  # numbers the reduction leaves for the caller beside the two losses


class PolicyLoss(NamedTuple):
    """0-d device tensors. All but the extremes add up over micro-batches and ranks."""

    loss: Tensor
    """Differentiable in the new logprobs."""
    clip_fraction: Tensor
    """Share of tokens whose clipped branch is the larger one."""
    kl_k1: Tensor
    """Mean of old - new logprob: estimates KL(old || new), nats per token."""
    kl_k3: Tensor
    """Mean of ratio - 1 - log ratio: the same, never negative."""
    ratio_min: Tensor
    """Smallest ratio; 1 without tokens. Merged with min."""
    ratio_max: Tensor
    """Largest ratio; 1 without tokens. Merged with max."""


class ValueLoss(NamedTuple):
    """Device tensors; loss and clip_fraction add up over micro-batches and ranks."""

    loss: Tensor
    """0-d, differentiable in the new values."""
    clip_fraction: Tensor
    """0-d share of tokens whose clipped branch is the larger one."""
    return_moments: Tensor
    """[3] of the returns, for `kernels.moments`."""
    error_moments: Tensor
    """[3] of return - value; with return_moments they give the explained variance."""


@triton.jit
def _scale(token_count, ACC: tl.constexpr):
    return 1.0 / tl.maximum(tl.load(token_count).to(ACC), 1.0)


@triton.jit
def _ppo_kernel(
    partials,  # [13, programs]
    policy_derivative,  # [T]; None, with the three after it, to leave the policy out
    logprobs,
    old_logprobs,
    advantages,
    value_derivative,  # [T]; None, with the three after it, to leave the value function out
    values,
    old_values,
    returns,
    response_mask,  # [T]
    token_count,  # [] of the whole minibatch
    mean_ptr,  # [], or None with rstd_ptr
    rstd_ptr,
    cliprange,
    value_cliprange,
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
    part = partials + program
    row = tl.num_programs(0)
    tl.store(part, count)
    if policy_derivative is not None:
        logprob = tl.load(logprobs + t, mask=inside, other=0.0).to(ACC)
        log_ratio = logprob - tl.load(old_logprobs + t, mask=inside, other=0.0).to(ACC)
        advantage = tl.load(advantages + t, mask=inside, other=0.0).to(ACC)
        if mean_ptr is not None:
            advantage = (advantage - tl.load(mean_ptr).to(ACC)) * tl.load(rstd_ptr).to(ACC)
            advantage = tl.where(inside, advantage, 0.0)
        loss, derivative, is_clipped = policy_token(log_ratio, advantage, tl.cast(cliprange, ACC))
        tl.store(policy_derivative + t, derivative * scale, mask=in_range)
        tl.store(part + row, tl.sum(loss))
        tl.store(part + 2 * row, tl.sum(is_clipped.to(ACC)))
        tl.store(part + 3 * row, -tl.sum(log_ratio))
        tl.store(part + 4 * row, tl.sum(exp_remainder(log_ratio)))
        tl.store(part + 5 * row, tl.min(tl.where(inside, log_ratio, float("inf"))))
        tl.store(part + 6 * row, tl.max(tl.where(inside, log_ratio, float("-inf"))))
    if value_derivative is not None:
        value = tl.load(values + t, mask=inside, other=0.0).to(ACC)
        old_value = tl.load(old_values + t, mask=inside, other=0.0).to(ACC)
        target = tl.load(returns + t, mask=inside, other=0.0).to(ACC)
        loss, derivative, is_clipped = value_token(
            value, old_value, target, tl.cast(value_cliprange, ACC)
        )
        tl.store(value_derivative + t, derivative * scale, mask=in_range)
        tl.store(part + 7 * row, tl.sum(loss))
        tl.store(part + 8 * row, tl.sum(is_clipped.to(ACC)))
        mean, squares = block_moments(target, inside, count)
        tl.store(part + 9 * row, mean)
        tl.store(part + 10 * row, squares)
        mean, squares = block_moments(target - value, inside, count)
        tl.store(part + 11 * row, mean)
        tl.store(part + 12 * row, squares)


@triton.jit
def _reduce_kernel(
    policy_total,  # [] loss
    value_total,  # [] loss
    sums,  # [12]: the other fields of PolicyLoss, then those of ValueLoss
    partials,  # [13, programs]
    token_count,
    num_programs,
    HAS_POLICY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
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
    if HAS_POLICY:
        loss = tl.load(part + num_programs, mask=inside, other=0.0)
        tl.store(policy_total, tl.sum(loss) * scale)
        for i in tl.static_range(3):
            terms = tl.load(part + (2 + i) * num_programs, mask=inside, other=0.0)
            tl.store(sums + i, tl.sum(terms) * scale)
        lowest = tl.load(part + 5 * num_programs, mask=inside, other=float("inf"))
        highest = tl.load(part + 6 * num_programs, mask=inside, other=float("-inf"))
        tl.store(sums + 3, tl.where(total > 0, tl.exp(tl.min(lowest)), 1.0))
        tl.store(sums + 4, tl.where(total > 0, tl.exp(tl.max(highest)), 1.0))
    if HAS_VALUE:
        loss = tl.load(part + 7 * num_programs, mask=inside, other=0.0)
        tl.store(value_total, tl.sum(loss) * scale)
        clipped = tl.load(part + 8 * num_programs, mask=inside, other=0.0)
        tl.store(sums + 5, tl.sum(clipped) * scale)
        for i in tl.static_range(2):
            mean = tl.load(part + (9 + 2 * i) * num_programs, mask=inside, other=0.0)
            squares = tl.load(part + (10 + 2 * i) * num_programs, mask=inside, other=0.0)
            mean, squares = merge_block_moments(count, mean, squares)
            tl.store(sums + 6 + 3 * i, total)
            tl.store(sums + 7 + 3 * i, mean)
            tl.store(sums + 8 + 3 * i, squares)


@traced("trident::ppo_loss")
def _ppo_loss(
    policy: list[Tensor],
    value: list[Tensor],
    mask: Tensor,
    num_tokens: Tensor,
    whitening: list[Tensor],
    cliprange: float,
    value_cliprange: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(policy loss, value loss, [12] sums, d loss / d logprobs [T], d loss / d values [T]).

    policy holds logprobs, old_logprobs, advantages; value holds values, old_values, returns;
    whitening a mean and an rstd. Each may be empty, and what it leads to then has no meaning.
    """
    dtype = _dtype(policy, value)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    tokens = len(mask)
    programs = triton.cdiv(tokens, _BLOCK)
    empty = partial(torch.empty, dtype=dtype, device=mask.device)
    losses, sums = [empty(()) for _ in range(2)], empty(_NUM_SUMS)
    partials = empty(_NUM_PARTIALS, programs)
    derivatives = [empty(tokens if part else 0) for part in (policy, value)]
    pointers: list[Tensor | None] = []
    for derivative, part in zip(derivatives, (policy, value), strict=True):
        pointers += [derivative, *(x.contiguous() for x in part)] if part else [None] * 4
    with torch.cuda.device_of(mask):
        if programs > 0:
            _ppo_kernel[(programs,)](
                partials,
                *pointers,
                mask.contiguous(),
                num_tokens,
                *(whitening or (None, None)),
                cliprange,
                value_cliprange,
                tokens,
                ACC=acc,
                BLOCK=_BLOCK,
                num_warps=num_warps_for(_BLOCK),
            )
        _reduce_kernel[(1,)](
            *losses,
            sums,
            partials,
            num_tokens,
            programs,
            HAS_POLICY=bool(policy),
            HAS_VALUE=bool(value),
            ACC=acc,
            PROGRAMS=next_power_of_2(programs),
        )
    return losses[0], losses[1], sums, derivatives[0], derivatives[1]


def _dtype(policy: list[Tensor], value: list[Tensor]) -> torch.dtype:
    """fp32, or fp64 for the gradient checks."""
    return torch.promote_types((policy or value)[0].dtype, torch.float32)


@_ppo_loss.register_fake
def _(policy: list[Tensor], value: list[Tensor], mask: Tensor, *_: object) -> tuple[Tensor, ...]:
    num_tokens = len(mask)
    shapes = ((), (), _NUM_SUMS, num_tokens if policy else 0, num_tokens if value else 0)
    return tuple(mask.new_empty(shape, dtype=_dtype(policy, value)) for shape in shapes)


class _PpoLoss(torch.autograd.Function):
    """(logprobs or None, values or None) to (policy loss, value loss, sums); keeps derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        values: Tensor | None,
        policy: list[Tensor],
        value: list[Tensor],
        *rest: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        policy_total, value_total, sums, *derivatives = _ppo_loss(policy, value, *rest)
        ctx.save_for_backward(*derivatives)
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, values)]
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return policy_total, value_total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [
            None if dtype is None or grad is None else (grad * derivative).to(dtype)
            for grad, derivative, dtype in zip(
                upstream[:2], ctx.saved_tensors, ctx.dtypes, strict=True
            )
        ]
        return *grads, *[None] * 7


def policy_loss_reference(
    policy: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    num_tokens: Tensor,
    cliprange: float,
    whitening: Whitening | None,
) -> PolicyLoss:
    """`policy_loss` in plain torch: the specification and the CPU path."""
    # Zeros outside the mask: ratio 1, whatever lies there.
    inside = tuple(torch.where(mask, x, 0) for x in policy)
    log_ratio, *branches = policy_branches(inside, cliprange, whitening)
    unclipped, clipped = (torch.where(mask, branch, 0) for branch in branches)
    scale = 1 / num_tokens.to(log_ratio.dtype).clamp(min=1)
    loss = torch.maximum(unclipped, clipped).sum() * scale
    with torch.no_grad():
        ratios = log_ratio[mask].exp() if mask.any() else log_ratio.new_ones(1)
        return PolicyLoss(
            loss=loss,
            clip_fraction=(clipped > unclipped).sum() * scale,
            kl_k1=-log_ratio.sum() * scale,
            kl_k3=(log_ratio.expm1() - log_ratio).sum() * scale,
            ratio_min=ratios.min(),
            ratio_max=ratios.max(),
        )


def value_loss_reference(
    value: tuple[Tensor, Tensor, Tensor], mask: Tensor, num_tokens: Tensor, cliprange: float
) -> ValueLoss:
    """`value_loss` in plain torch: the specification and the CPU path."""
    dtype = torch.promote_types(value[0].dtype, torch.float32)
    new, old, target = (torch.where(mask, x.to(dtype), 0) for x in value)
    unclipped, clipped = value_branches((new, old, target), cliprange)
    scale = 1 / num_tokens.to(dtype).clamp(min=1)
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() * scale
    with torch.no_grad():
        return ValueLoss(
            loss=loss,
            clip_fraction=(clipped > unclipped).sum() * scale,
            return_moments=masked_moments(target, mask),
            error_moments=masked_moments(target - new, mask),
        )


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> PolicyLoss:
    """Clipped policy loss, differentiable in `logprobs`, and its metrics.

    logprobs, old_logprobs, advantages [T]; mask [T] bool; num_tokens 0-d, the minibatch's count of
    response tokens over all micro-batches and ranks. The advantages are whitened as they are read
    if a whitening is given. Nothing outside the mask is read; zero tokens give zeros.
    """
    policy = (logprobs, old_logprobs, advantages)
    if not uses_triton(logprobs):
        return policy_loss_reference(policy, mask, num_tokens, cliprange, whitening)
    loss, _, sums = _PpoLoss.apply(
        logprobs, None, list(policy), [], mask, num_tokens, list(whitening or ()), cliprange, 0.0
    )
    return PolicyLoss(loss, *sums[:5].unbind())


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

    values, old_values, returns [T]; mask [T] bool; num_tokens as in `policy_loss`. A cliprange of
    `math.inf` is the plain squared error. Nothing outside the mask is read; zero tokens give zeros.
    """
    value = (values, old_values, returns)
    if not uses_triton(values):
        return value_loss_reference(value, mask, num_tokens, cliprange)
    _, loss, sums = _PpoLoss.apply(
        None, values, [], list(value), mask, num_tokens, [], 0.0, cliprange
    )
    return ValueLoss(loss, sums[5], sums[6:9], sums[9:])


def ppo_loss(
    policy: tuple[Tensor, Tensor, Tensor],
    value: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
    value_cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> tuple[PolicyLoss, ValueLoss]:
    """`policy_loss` and `value_loss` of the same tokens in one launch.

    policy is (logprobs, old_logprobs, advantages); value is (values, old_values, returns).
    """
    if not uses_triton(mask):
        return (
            policy_loss_reference(policy, mask, num_tokens, cliprange, whitening),
            value_loss_reference(value, mask, num_tokens, value_cliprange),
        )
    rest = (mask, num_tokens, list(whitening or ()), cliprange, value_cliprange)
    first, second, sums = _PpoLoss.apply(policy[0], value[0], list(policy), list(value), *rest)
    return (
        PolicyLoss(first, *sums[:5].unbind()),
        ValueLoss(second, sums[5], sums[6:9], sums[9:]),
    )
