"""PPO's clipped policy loss of each token with its derivative, and what a batch of them amounts to.

    ratio = exp(logprob - old_logprob),   A = (advantage - mean) * rstd
    loss  = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))

Where the two branches tie, the unclipped one is taken: at ratio 1 the gradient is -A.
(Schulman et al. 2017, eq. 7.)

A token's loss, derivative and terms are computed once, as soon as its log-prob is known. The terms
[3, T] are its loss, its log ratio and whether it is clipped; the metrics are their reductions.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kl_estimate import exp_remainder
from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.moments import Whitening
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_BLOCK = 512
"""Tokens of a program that computes losses."""
_METRICS_BLOCK = 1024
"""Tokens of a program that adds up terms."""
_NUM_TERMS = 3
_NUM_PARTIALS = 6
"""Numbers that such a program leaves for the reduction: the count, and one for each metric."""


class PolicyMetrics(NamedTuple):
    """0-d device tensors. All but the extremes add up over micro-batches and ranks."""

    loss: Tensor
    """Sum of the tokens' losses over the count of the minibatch."""
    clip_fraction: Tensor
    """Share of tokens whose clipped branch is the larger one."""
    kl_k3: Tensor
    """Mean of ratio - 1 - log ratio: estimates KL(old || new), nats a token, never negative."""
    ratio_min: Tensor
    """Smallest ratio; 1 without tokens. Merged with min."""
    ratio_max: Tensor
    """Largest ratio; 1 without tokens. Merged with max."""


@triton.jit
def _clipped_token(log_ratio, advantage, cliprange):
    """(loss, derivative by the new logprob, is clipped) of each token."""
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - cliprange), 1 + cliprange)
    # d/dlogprob of -A ratio is -A ratio; the clipped branch is the larger only where it is flat.
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)  # a NaN stays one; tl.maximum would drop it
    return loss, tl.where(is_clipped, 0.0, unclipped), is_clipped


@triton.jit
def _token_losses_kernel(
    logprobs,  # [n]
    old_logprobs,  # [T]
    advantages,  # [T]
    rows,  # [n], of the T
    num_tokens,  # 0-d
    mean,  # 0-d; None without whitening, as is rstd
    rstd,
    losses,  # [n] out
    derivatives,  # [n] out
    terms,  # [3, n] out
    cliprange,
    num_rows,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_rows
    row = tl.load(rows + at, mask=inside, other=0)
    advantage = tl.load(advantages + row, mask=inside, other=0.0).to(ACC)
    if mean is not None:
        advantage = (advantage - tl.load(mean).to(ACC)) * tl.load(rstd).to(ACC)
    new = tl.load(logprobs + at, mask=inside, other=0.0).to(ACC)
    old = tl.load(old_logprobs + row, mask=inside, other=0.0).to(ACC)
    log_ratio = new - old
    loss, derivative, is_clipped = _clipped_token(log_ratio, advantage, tl.cast(cliprange, ACC))
    count = tl.load(num_tokens).to(ACC)
    tl.store(losses + at, loss / count, mask=inside)
    tl.store(derivatives + at, derivative / count, mask=inside)
    tl.store(terms + at, loss, mask=inside)
    tl.store(terms + num_rows + at, log_ratio, mask=inside)
    tl.store(terms + 2 * num_rows + at, is_clipped.to(ACC), mask=inside)


def policy_token_losses(
    policy: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped loss of each token over num_tokens, its derivative, and its terms for the metrics.

    policy holds logprobs [n], and old_logprobs and advantages [T], of which the n tokens are `rows`
    [n] int64; num_tokens is 0-d. The losses and their derivatives by the new log-prob are [n]. The
    terms [3, n] are the loss before the division, the log ratio, and 1 where clipped, else 0. None
    has a gradient: it is a TokenLoss for `kernels.linear_logprobs`.
    """
    logprobs, old_logprobs, advantages = (x.detach() for x in policy)
    if not uses_triton(logprobs):
        picked = (logprobs, old_logprobs[rows], advantages[rows])
        return _token_losses_reference(picked, num_tokens, cliprange, whitening)
    dtype = accumulation_dtype(logprobs.dtype)
    losses, derivatives = (torch.empty_like(logprobs, dtype=dtype) for _ in range(2))
    terms = losses.new_empty(_NUM_TERMS, len(rows))
    if len(rows) > 0:
        with torch.cuda.device_of(logprobs):
            _token_losses_kernel[(triton.cdiv(len(rows), _BLOCK),)](
                *(x.contiguous() for x in (logprobs, old_logprobs, advantages, rows)),
                num_tokens,
                *(whitening or (None, None)),
                losses,
                derivatives,
                terms,
                cliprange,
                len(rows),
                ACC=triton_dtype(dtype),
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return losses, derivatives, terms


def _token_losses_reference(
    policy: tuple[Tensor, Tensor, Tensor],
    num_tokens: Tensor,
    cliprange: float,
    whitening: Whitening | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`policy_token_losses` of logprobs, old_logprobs and advantages [n] each, in plain torch."""
    dtype = accumulation_dtype(policy[0].dtype)
    logprob, old_logprob, advantage = (x.to(dtype) for x in policy)
    if whitening is not None:
        advantage = (advantage - whitening.mean) * whitening.rstd
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    is_clipped = clipped > unclipped
    losses = torch.maximum(unclipped, clipped)
    derivatives = torch.where(is_clipped, 0.0, unclipped)
    terms = torch.stack((losses, log_ratio, is_clipped.to(dtype)))
    return losses / num_tokens, derivatives / num_tokens, terms


@triton.jit
def _metrics_kernel(
    partials,  # [6, programs]
    terms,  # [3, T]
    response_mask,  # [T]
    num_tokens,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    t = program * BLOCK + tl.arange(0, BLOCK)
    in_range = t < num_tokens
    inside = in_range & (tl.load(response_mask + t, mask=in_range, other=0) != 0)
    loss = tl.load(terms + t, mask=inside, other=0.0)
    log_ratio = tl.load(terms + num_tokens + t, mask=inside, other=0.0)
    is_clipped = tl.load(terms + 2 * num_tokens + t, mask=inside, other=0.0)
    part = partials + program
    row = tl.num_programs(0)
    tl.store(part, tl.sum(inside.to(ACC)))
    tl.store(part + row, tl.sum(loss))
    tl.store(part + 2 * row, tl.sum(is_clipped))
    tl.store(part + 3 * row, tl.sum(exp_remainder(log_ratio)))
    tl.store(part + 4 * row, tl.min(tl.where(inside, log_ratio, float("inf"))))
    tl.store(part + 5 * row, tl.max(tl.where(inside, log_ratio, float("-inf"))))


@triton.jit
def _reduce_kernel(
    metrics,  # [5], in the order of PolicyMetrics
    partials,  # [6, programs]
    token_count,  # 0-d, of the whole minibatch
    num_programs,
    ACC: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # One program adds up all partials: the number of tokens alone fixes the order.
    lane = tl.arange(0, PROGRAMS)
    inside = lane < num_programs
    part = partials + lane
    total = tl.sum(tl.load(part, mask=inside, other=0.0))
    scale = 1.0 / tl.maximum(tl.load(token_count).to(ACC), 1.0)
    for i in tl.static_range(3):
        sums = tl.load(part + (1 + i) * num_programs, mask=inside, other=0.0)
        tl.store(metrics + i, tl.sum(sums) * scale)
    lowest = tl.load(part + 4 * num_programs, mask=inside, other=float("inf"))
    highest = tl.load(part + 5 * num_programs, mask=inside, other=float("-inf"))
    tl.store(metrics + 3, tl.where(total > 0, tl.exp(tl.min(lowest)), 1.0))
    tl.store(metrics + 4, tl.where(total > 0, tl.exp(tl.max(highest)), 1.0))


@traced("trident::policy_metrics")
def _policy_metrics(terms: Tensor, mask: Tensor, num_tokens: Tensor) -> Tensor:
    """[5] in the order of PolicyMetrics."""
    tokens = len(mask)
    programs = triton.cdiv(tokens, _METRICS_BLOCK)
    metrics, partials = terms.new_empty(5), terms.new_empty(_NUM_PARTIALS, programs)
    acc = triton_dtype(terms.dtype)
    with torch.cuda.device_of(mask):
        if programs > 0:
            _metrics_kernel[(programs,)](
                partials,
                terms.contiguous(),
                mask.contiguous(),
                tokens,
                ACC=acc,
                BLOCK=_METRICS_BLOCK,
                num_warps=num_warps_for(_METRICS_BLOCK),
            )
        _reduce_kernel[(1,)](
            metrics,
            partials,
            num_tokens,
            programs,
            ACC=acc,
            PROGRAMS=next_power_of_2(programs),
        )
    return metrics


@_policy_metrics.register_fake
def _(terms: Tensor, *_: object) -> Tensor:
    return terms.new_empty(5)


def policy_metrics(terms: Tensor, mask: Tensor, num_tokens: Tensor) -> PolicyMetrics:
    """What the terms [3, T] of `policy_token_losses` amount to over the mask [T] bool.

    num_tokens: 0-d, the minibatch's count of response tokens over all micro-batches and ranks.
    Nothing outside the mask is read; zero tokens give zeros, and ratios of 1. No gradient.
    """
    terms = terms.detach()
    if uses_triton(terms):
        return PolicyMetrics(*_policy_metrics(terms, mask, num_tokens).unbind())
    loss, log_ratio, is_clipped = torch.where(mask, terms, 0).unbind()
    scale = 1 / num_tokens.to(terms.dtype).clamp(min=1)
    ratios = log_ratio[mask].exp() if mask.any() else terms.new_ones(1)
    return PolicyMetrics(
        loss=loss.sum() * scale,
        clip_fraction=is_clipped.sum() * scale,
        kl_k3=(log_ratio.expm1() - log_ratio).sum() * scale,
        ratio_min=ratios.min(),
        ratio_max=ratios.max(),
    )
