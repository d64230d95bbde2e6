"""Phase 3 of PPO, score: what policy, reference, critic and reward model say of a rollout."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.batches import PackedBatch
from engine.data.examples import Example
from engine.data.tokenizer import Tokenizer
from engine.feed import pack_for
from engine.losses import last_readings
from engine.rollout import Rollout
from engine.settings.ppo import EosRule, PPOConfig
from engine.training.network import Network
from engine.training.passes import forward
from models.readouts import shift_right

CHECKED_SHARE = 16
"""One response in so many is read again where the sampler's log-probs are taken: our choice, by
arithmetic under 1% of an iteration, and any bug that parts the two shows in all of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What four networks say of a rollout of B responses and T tokens, the same on every rank."""

    logprobs: Tensor
    """[T] of the policy that sampled: what ratios are taken against. By the trainer's forward pass,
    or the sampler's themselves."""
    checked_logprobs: Tensor | None = None
    """[T] of the policy by the trainer's forward pass, in the first num_checked responses, where
    `logprobs` are the sampler's; None: they are that pass's own."""
    num_checked: int
    """How many responses the policy has read again."""
    ref_logprobs: Tensor
    """[T] of the reference."""
    values: Tensor
    """[T] of the critic: of the state in which the token was chosen."""
    scores: Tensor
    """[B] of the reward model, at the last response token, after the EOS rule."""
    raw_scores: Tensor
    """[B] of the reward model, before the EOS rule."""

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """Return the phase's numbers over the global batch."""
        mask = rollout.response_mask
        log_ratio = (self.logprobs - self.ref_logprobs)[mask].double()
        end = int(rollout.cu_seqlens[self.num_checked])
        read_again = self.logprobs if self.checked_logprobs is None else self.checked_logprobs
        spread = {"score/reward_std": float(self.raw_scores.std())} if len(rollout) > 1 else {}
        mismatch = (rollout.sampled_logprobs - read_again)[:end][mask[:end]].abs()
        return {
            "score/reward_mean": float(self.raw_scores.mean()),
            **spread,
            "score/kl": float(log_ratio.sum()) / len(rollout),
            "score/kl_per_token": float(log_ratio.mean()),
            "score/logprob_mismatch_mean": float(mismatch.mean()),
            "score/logprob_mismatch_max": float(mismatch.max()),
        }

    def samples(
        self, rollout: Rollout, tokenizer: Tokenizer, count: int
    ) -> list[dict[str, str | float]]:
        """Return the first `count` responses as text, with their scores before the EOS rule."""
        columns = (
            rollout.prompts(tokenizer, count),
            rollout.responses(tokenizer, count),
            self.raw_scores[:count].tolist(),
        )
        return [
            {"prompt": prompt, "response": response, "score": score}
            for prompt, response, score in zip(*columns, strict=True)
        ]


def score_rollout(
    rollout: Rollout,
    config: PPOConfig,
    *,
    policy: Network,
    reference: Network,
    critic: Network,
    reward_model: Network,
) -> Scored:
    """Return log-probs, values and scores of a rollout; all ranks call together.

    With config.scores_policy False the sampler's log-probs are the policy's, which then reads some
    responses again to check them. The temperature of sampling divides the logits here too.
    """
    budget, temperature = config.micro_batch_tokens, config.sampling.temperature
    batches = pack_for(rollout.examples, reference.parallel, budget)
    scalar_batches = pack_for(rollout.examples, critic.parallel, budget)  # in another layout
    read_again, num_checked = batches, len(rollout)
    if not config.scores_policy:
        num_checked = -(-len(rollout) // CHECKED_SHARE)
        read_again = pack_for(rollout.examples[:num_checked], policy.parallel, budget)
    # Language and scalar models in turn: while one is read, residency swaps the other pair.
    readings = {
        "policy": _read(policy, read_again, rollout, temperature=temperature),
        "critic": _read(critic, scalar_batches, rollout),
        "reference": _read(reference, batches, rollout, temperature=temperature),
        "reward_model": _read(reward_model, scalar_batches, rollout),
    }
    return scored_from(rollout, config, readings, num_checked=num_checked)


def scored_from(
    rollout: Rollout, config: PPOConfig, readings: Mapping[str, Tensor], *, num_checked: int
) -> Scored:
    """Return log-probs, values and scores, of what the four networks read of a rollout: [T] each,
    by role.

    num_checked: how many responses the policy has read.
    """
    checked = readings["policy"]
    # A value is read one token before its own; a prompt has at least one token, so none crosses
    # sequences.
    values = shift_right(readings["critic"]).masked_fill(~rollout.response_mask, 0.0)
    raw_scores = last_readings(readings["reward_model"], rollout.cu_seqlens)
    return Scored(
        logprobs=checked if config.scores_policy else rollout.sampled_logprobs,
        checked_logprobs=None if config.scores_policy else checked,
        num_checked=num_checked,
        ref_logprobs=readings["reference"],
        values=values,
        scores=apply_eos_rule(raw_scores, rollout.has_eos, config.eos_rule, config.eos_penalty),
        raw_scores=raw_scores,
    )


def scored_examples(rollout: Rollout, scored: Scored) -> list[Example]:
    """Return the responses as examples that carry what sampler and networks said of them: what a
    rollout is made from again, and compared with."""
    examples = rollout.carrying(
        {
            "sampled_logprobs": rollout.sampled_logprobs,
            "logprobs": scored.logprobs,
            "values": scored.values,
            "ref_logprobs": scored.ref_logprobs,
        }
    )
    ends, scores = rollout.has_eos.cpu().numpy(), scored.raw_scores.cpu().numpy()
    return [
        replace(example, fields={**example.fields, "has_eos": has_eos, "raw_score": score})
        for example, has_eos, score in zip(examples, ends, scores, strict=True)
    ]


def apply_eos_rule(scores: Tensor, has_eos: Tensor, rule: EosRule, penalty: float) -> Tensor:
    """Return the scores [B] with the rule for responses that hit the length limit, where has_eos
    [B] is False: "penalty" takes it off the score, "replace" makes -penalty the score, "none"
    leaves it."""
    if rule == "penalty":
        return torch.where(has_eos, scores, scores - penalty)
    if rule == "replace":
        return torch.where(has_eos, scores, torch.full_like(scores, -penalty))
    return scores


def read_rollout(
    network: Network, rollout: Rollout, micro_batch_tokens: int, *, temperature: float = 1.0
) -> Tensor:
    """Return a network's output [T] for a rollout: log-probs of a language model, readings of a
    scalar one."""
    batches = pack_for(rollout.examples, network.parallel, micro_batch_tokens)
    return _read(network, batches, rollout, temperature=temperature)


def _read(
    network: Network, batches: list[PackedBatch], rollout: Rollout, *, temperature: float = 1.0
) -> Tensor:
    """Return the network's output [T] in the rollout's order: each rank reads its part, and all
    sum up."""
    full = torch.zeros(rollout.num_tokens, device=rollout.response_mask.device)
    starts = rollout.cu_seqlens[:-1].long()
    with network.present():
        outputs = forward(network, batches, temperature=temperature)
    for batch, output in zip(batches, outputs, strict=True):
        ids = torch.repeat_interleave(batch.sequence_ids, batch.cu_seqlens.diff().long())
        is_real = ids >= 0
        full[starts[ids[is_real]] + batch.positions[is_real]] = output[is_real]
    dist.all_reduce(full, group=network.parallel.dp_group)
    return full
