"""Phase 4 of PPO, advantage: from scores to advantages, by the KL penalty and GAE; the penalty's
controller."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rollout import Rollout
from engine.score import Scored
from engine.settings.kl import MAX_KL_ERROR, KLConfig
from engine.settings.ppo import PPOConfig
from kernels.gae import gae
from kernels.moments import Whitening, merge_moments, whitening


@dataclass(frozen=True, kw_only=True, eq=False)
class Advantages:
    """What the tokens of a rollout are to learn from, [T] each, 0 outside the responses."""

    rewards: Tensor
    """-kl_coef x KL estimate, and the score at the last response token."""
    advantages: Tensor
    """Not whitened, since returns need them so: the loss whitens them as it reads them."""
    returns: Tensor
    """advantages + values."""
    whitening: Whitening | None
    """Of the advantages, over the global batch; None: none is asked for."""

    def metrics(self, rollout: Rollout, scored: Scored) -> dict[str, float]:
        """Return the phase's numbers over the global batch."""
        mask = rollout.response_mask
        outside = torch.stack([self.rewards, self.advantages, self.returns])[:, ~mask]
        advantages = self.advantages[mask]
        return {
            "advantage/mean": float(advantages.mean()),
            "advantage/std": float(advantages.std()) if len(advantages) > 1 else 0.0,
            "advantage/value_mean": float(scored.values[mask].mean()),
            "advantage/return_mean": float(self.returns[mask].mean()),
            "advantage/pad_leak": float(outside.abs().max()) if outside.numel() else 0.0,
        }


def estimate_advantages(
    rollout: Rollout, scored: Scored, config: PPOConfig, *, kl_coef: float
) -> Advantages:
    """Return rewards, advantages and returns, and the whitening of the advantages, global over all
    ranks (gamma, lam, kl.estimator and whiten_advantages are the config's)."""
    result = gae(
        scored.logprobs,
        scored.ref_logprobs,
        scored.values,
        scored.scores,
        rollout.cu_seqlens,
        rollout.response_mask,
        kl_coef=kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        kl_estimator=config.kl.estimator,
    )
    rewards, advantages, returns = result[:3]
    return Advantages(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        whitening=whitening(merge_moments(result.stats)) if config.whiten_advantages else None,
    )


class KLController:
    """Holds the coefficient; its state belongs in the checkpoint."""

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def update(self, kl: float, num_responses: int) -> None:
        """Move coef after an iteration whose responses had `kl` nats on average (sum over tokens).

            error = clip(kl / target - 1, -0.2, 0.2)
            coef *= 1 + error x num_responses / horizon     (Ziegler 2019, 2.2)

        KLConfig.check_batch keeps the factor above 0. A KL that is not finite says nothing of the
        coefficient, which would not be a number again.
        """
        if self.config.control == "fixed" or not math.isfinite(kl):
            return
        error = min(max(kl / self.config.target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.coef *= 1.0 + error * num_responses / self.config.horizon

    def state_dict(self) -> float:
        """Return what a resume continues from."""
        return self.coef

    def load_state_dict(self, state: float) -> None:
        """Continue where state_dict() was taken."""
        self.coef = state
