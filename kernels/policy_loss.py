"""PPO's clipped losses of a token: in kernels with their derivatives, and in plain torch.

    ratio   = exp(logprob - old_logprob),   A = (advantage - mean) * rstd
    policy  = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    value   = 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

Where the two branches tie, the unclipped one is taken: at ratio 1 the gradient is -A.
(Schulman et al. 2017, eq. 7.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import uses_triton
from kernels.moments import Whitening

_BLOCK = 512
"""Tokens of a program."""


@triton.jit
def policy_token(log_ratio, advantage, cliprange):
    """(loss, derivative by the new logprob, is clipped) of each token."""
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - cliprange), 1 + cliprange)
    # d/dlogprob of -A ratio is -A ratio; the clipped branch is the larger only where it is flat.
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)  # a NaN stays one; tl.maximum would drop it
    return loss, tl.where(is_clipped, 0.0, unclipped), is_clipped


@triton.jit
def value_token(value, old_value, target, cliprange):
    """(loss, derivative by the new value, is clipped) of each token."""
    near_old = tl.minimum(tl.maximum(value, old_value - cliprange), old_value + cliprange)
    unclipped = (value - target) * (value - target)
    clipped = (near_old - target) * (near_old - target)
    is_clipped = clipped > unclipped
    derivative = tl.where(is_clipped, 0.0, value - target)
    return 0.5 * tl.where(is_clipped, clipped, unclipped), derivative, is_clipped


def policy_branches(
    policy: tuple[Tensor, ...], cliprange: float, whitening: Whitening | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log ratio, -A ratio, -A clip(ratio)) of each token.

    policy holds logprobs, old_logprobs and advantages, [n] each.
    """
    dtype = torch.promote_types(policy[0].dtype, torch.float32)
    logprob, old_logprob, advantage = (x.to(dtype) for x in policy)
    if whitening is not None:
        advantage = (advantage - whitening.mean) * whitening.rstd
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()
    return log_ratio, -advantage * ratio, -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)


def value_branches(value: tuple[Tensor, ...], cliprange: float) -> tuple[Tensor, Tensor]:
    """((v - R)^2, (clip(v) - R)^2) of each token; value holds values, old_values, returns [n]."""
    new, old, target = value
    near_old = new.clamp(old - cliprange, old + cliprange)
    return (new - target).square(), (near_old - target).square()


@triton.jit
def _policy_tokens_kernel(
    logprobs,  # [n]
    old_logprobs,  # [T]
    advantages,  # [T]
    rows,  # [n], of the T
    num_tokens,  # 0-d
    mean,  # 0-d; None without whitening, as is rstd
    rstd,
    losses,  # [n] out
    derivatives,  # [n] out
    cliprange,
    num_rows,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_rows
    row = tl.load(rows + at, mask=inside, other=0)
    advantage = tl.load(advantages + row, mask=inside, other=0.0).to(ACC)
    if mean is not None:
        advantage = (advantage - tl.load(mean).to(ACC)) * tl.load(rstd).to(ACC)
    new = tl.load(logprobs + at, mask=inside, other=0.0).to(ACC)
    old = tl.load(old_logprobs + row, mask=inside, other=0.0).to(ACC)
    loss, derivative, _ = policy_token(new - old, advantage, tl.cast(cliprange, ACC))
    count = tl.load(num_tokens).to(ACC)
    tl.store(losses + at, loss / count, mask=inside)
    tl.store(derivatives + at, derivative / count, mask=inside)


def policy_token_losses(
    policy: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss of each token over num_tokens, and its derivative by the new log-prob.

    policy holds logprobs [n], and old_logprobs and advantages [T], of which the n tokens are `rows`
    [n] int64; num_tokens is 0-d. Both results are [n], without gradient: for what fuses the loss
    with the logits' gradient.
    """
    logprobs, old_logprobs, advantages = (x.detach() for x in policy)
    if not uses_triton(logprobs):
        picked = (logprobs, old_logprobs[rows], advantages[rows])
        unclipped, clipped = policy_branches(picked, cliprange, whitening)[1:]
        derivatives = torch.where(clipped > unclipped, 0.0, unclipped)
        return torch.maximum(unclipped, clipped) / num_tokens, derivatives / num_tokens
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    losses, derivatives = (torch.empty_like(logprobs, dtype=dtype) for _ in range(2))
    if len(rows) > 0:
        with torch.cuda.device_of(logprobs):
            _policy_tokens_kernel[(triton.cdiv(len(rows), _BLOCK),)](
                *(x.contiguous() for x in (logprobs, old_logprobs, advantages, rows)),
                num_tokens,
                *(whitening or (None, None)),
                losses,
                derivatives,
                cliprange,
                len(rows),
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return losses, derivatives
