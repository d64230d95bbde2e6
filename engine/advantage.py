"""Phase 4 of PPO, advantage: from scores to advantages, by the KL penalty and GAE; the penalty's
controller."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.printable import printable
from engine.rollout import Rollout
from engine.score import Scored
from engine.settings.kl import MAX_KL_ERROR, KLConfig
from engine.settings.ppo import PPOConfig
from kernels.gae import gae
from kernels.moments import Whitening, merge_moments, whitening

_NUM_NAMED = 3  # samples that are named; our choice: a line on screen holds them
_SHOWN = 40  # characters of a prompt; our choice


@dataclass(frozen=True, kw_only=True, eq=False)
class Advantages:
    """What the tokens of a rollout are to learn from, [T] each, 0 outside the responses."""

    kl_coef: float
    """What the KL estimates were multiplied by."""
    kl: Tensor
    """KL estimates to the reference."""
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
        kl_coef=kl_coef,
        kl=result.kl,
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


def unsound_clause(
    rollout: Rollout, scored: Scored, advantages: Advantages, decode: Callable[[list[int]], str]
) -> str:
    """Return a clause that says which output was not finite, the first in the order in which they
    are computed, and of which samples: by index in the rollout, with their prompts' beginnings."""
    for name, samples in unsound_samples(rollout, scored, advantages).items():
        if not samples:
            continue
        named = [_shown(index, rollout, decode) for index in samples[:_NUM_NAMED]]
        more = f" and {len(samples) - _NUM_NAMED} more" if len(samples) > _NUM_NAMED else ""
        return (
            f"{name} are not finite in {len(samples)} of {len(rollout)} responses: "
            f"{', '.join(named)}{more}"
        )
    return "a number of its tokens is not finite"


def unsound_samples(
    rollout: Rollout, scored: Scored, advantages: Advantages
) -> dict[str, list[int]]:
    """Return the samples, by index in the rollout, in which an output is not finite: for all that
    an iteration learns from, in words, in the order in which they are computed."""
    columns = {
        "the sampler's log-probs": rollout.sampled_logprobs,
        "the policy's log-probs": scored.logprobs,
        "the critic's values": scored.values,
        "the reference's log-probs": scored.ref_logprobs,
        "the reward model's scores": scored.raw_scores,
        "the KL estimates": advantages.kl,
        "the rewards": advantages.rewards,
        "the advantages": advantages.advantages,
        "the returns": advantages.returns,
    }
    return {name: broken_samples(column, rollout) for name, column in columns.items()}


def broken_samples(column: Tensor, rollout: Rollout) -> list[int]:
    """Return the samples in which a column, [B] or [T], is not finite."""
    is_broken = (~column.isfinite()).cpu()
    if len(is_broken) != rollout.num_tokens:
        return is_broken.nonzero().flatten().tolist()
    bounds = rollout.cu_seqlens.tolist()
    return [n for n in range(len(rollout)) if bool(is_broken[bounds[n] : bounds[n + 1]].any())]


def _shown(index: int, rollout: Rollout, decode: Callable[[list[int]], str]) -> str:
    example = rollout.examples[index]
    text = decode(example.tokens[: example.prompt_length].tolist())
    return f'sample {index} ("{printable(text, limit=_SHOWN, one_line=True)}")'
