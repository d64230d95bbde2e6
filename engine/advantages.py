"""From scores to advantages: the KL penalty and its controller, GAE, whitening over the global
batch."""

import math

from engine.rollout import Rollout
from engine.settings.kl import KLConfig
from kernels.gae import gae
from kernels.kl_estimate import KlEstimator
from kernels.moments import Whitening, merge_moments, whitening


class KLController:
    """Holds the coefficient; its state belongs in the checkpoint."""

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def update(self, kl: float, num_responses: int) -> None:
        """Move coef after an iteration whose responses had `kl` nats on average (sum over tokens).

        error = clip(kl / target - 1, -0.2, 0.2);  coef *= 1 + error x num_responses / horizon
        (Ziegler 2019, 2.2)
        A KL that is not finite says nothing of the coefficient, which would not be a number again.
        """
        if self.config.control == "fixed" or not math.isfinite(kl):
            return
        error = min(max(kl / self.config.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_responses / self.config.horizon


def estimate_advantages(
    rollout: Rollout,
    *,
    kl_coef: float,
    kl_estimator: KlEstimator,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Rollout, Whitening | None]:
    """Fill in rewards, advantages and returns; return the whitening of the advantages, global over
    all ranks.

    The advantages stay as they are, since returns need them so: the loss whitens them as it reads
    them.
    """
    result = gae(
        rollout.logprobs,
        rollout.ref_logprobs,
        rollout.values,
        rollout.scores,
        rollout.cu_seqlens,
        rollout.response_mask,
        kl_coef=kl_coef,
        gamma=gamma,
        lam=lam,
        kl_estimator=kl_estimator,
    )
    rollout.rewards, rollout.advantages, rollout.returns = result[:3]
    return rollout, whitening(merge_moments(result.stats)) if whiten else None
