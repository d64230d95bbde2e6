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

from kernels.moments import Whitening


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


def policy_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> Tensor:
    """[n] clipped policy loss of each token, differentiable in `logprobs`, in plain torch.

    For what fuses the loss with the logits' gradient.
    """
    policy = (logprobs, old_logprobs, advantages)
    return torch.maximum(*policy_branches(policy, cliprange, whitening)[1:])
