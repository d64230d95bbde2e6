"""Rollouts: responses to a batch of prompts, then log-probs, values and scores of every one of
them.

Index convention, everywhere in Trident: position t of logprobs, ref_logprobs, sampled_logprobs,
values, rewards, advantages, returns and response_mask belongs to the token at t, which was chosen
in the state before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.batches import PackedBatch, deal
from engine.data.examples import Example
from engine.feed import pack_for
from engine.generation.generate import Response, generate, length_spread
from engine.ranks.parallel import Parallel
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from engine.training.passes import forward
from models.gpt import shift_right

EosRule = Literal["none", "penalty", "replace"]

CHECKED_SHARE = 16
"""One response in so many is read again where the sampler's log-probs are taken: our choice, by
arithmetic under 1% of an iteration, and any bug that parts the two shows in all of them."""


@dataclass(kw_only=True)
class Rollout:
    """One iteration's responses of all data-parallel ranks, in prompt order, the same on every
    rank.

    B responses, T tokens of prompts and responses together, packed; tensors are on the rank's
    device. Tokens and numbers of a whole iteration are a few megabytes, so every rank holds all of
    them: global statistics need no further collective, and any rank can train on any response.
    """

    tokens: Tensor
    """[T] int64."""
    cu_seqlens: Tensor
    """[B+1] int32."""
    response_mask: Tensor
    """[T] bool: the token was sampled."""
    sampled_logprobs: Tensor
    """[T] of the sampler, 0 in prompts."""
    has_eos: Tensor
    """[B] bool: the response ended by itself and not at the length limit."""
    prompt_lengths: list[int]
    """[B]."""
    length_spread: float = 1.0
    """How evenly the replicas shared the generated tokens; see length_spread."""
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] of the policy that sampled: what ratios are taken against. By the trainer's forward pass,
    or the sampler's themselves."""
    checked_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] of the policy by the trainer's forward pass, in the first num_checked responses."""
    num_checked: int = 0
    """How many; 0 for all."""
    ref_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] of the reference."""
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] of the critic: of the state in which the token was chosen."""
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    """[B] of the reward model, at the last response token, after the EOS rule."""
    raw_scores: Tensor = field(default_factory=lambda: torch.empty(0))
    """[B] of the reward model, before the EOS rule."""
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] -kl_coef x KL estimate, and the score at the last response token."""
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T], not whitened."""
    returns: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T] advantages + values."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of every response."""
        lengths = self.cu_seqlens.diff().tolist()
        return [n - p for n, p in zip(lengths, self.prompt_lengths, strict=True)]

    def examples(self) -> list[Example]:
        """Return the responses as training examples that carry the per-token numbers computed so
        far."""
        names = ("logprobs", "values", "advantages", "returns")
        columns = {n: getattr(self, n).cpu().numpy() for n in names if len(getattr(self, n))}
        tokens, bounds = self.tokens.cpu().numpy(), self.cu_seqlens.tolist()
        return [
            Example(
                tokens=tokens[start:end],
                prompt_length=prompt_length,
                fields={name: column[start:end] for name, column in columns.items()},
            )
            for start, end, prompt_length in zip(
                bounds[:-1], bounds[1:], self.prompt_lengths, strict=True
            )
        ]


def generate_rollout(  # noqa: PLR0913 - what a draw is keyed by, each named
    policy: Network,
    prompts: Sequence[Example],
    sampling: SamplingConfig,
    *,
    eos_id: int,
    seed: int,
    first_sample_index: int,
    on_response: Callable[[], None] | None = None,
) -> Rollout:
    """Sample one response to each prompt, data-parallel ranks sharing the prompts, and gather all
    of them.

    Draw i is keyed by (seed, first_sample_index + i, position): a resume or another layout samples
    the same. on_response() hears of each response that this rank has finished.
    """
    parallel = policy.parallel
    # Generation has whole sequences on a rank: those that share rows in training take prompts each.
    lengths = [len(p.tokens) for p in prompts]
    mine = deal(lengths, parallel.num_replicas, parallel.replica_rank)
    responses = []
    for response in generate(
        policy,
        [prompts[i].tokens for i in mine],
        sampling,
        eos_id=eos_id,
        seed=seed,
        sample_indices=[first_sample_index + i for i in mine],
    ):
        responses.append(response)
        if on_response is not None:
            on_response()
    gathered: list[list[Response]] = [[]] * parallel.num_replicas
    dist.all_gather_object(gathered, responses, group=parallel.replica_group)
    by_index = {r.sample_index - first_sample_index: r for part in gathered for r in part}
    rollout = _join(prompts, [by_index[i] for i in range(len(prompts))], parallel)
    rollout.length_spread = length_spread([sum(len(r.tokens) for r in part) for part in gathered])
    return rollout


def score_rollout(  # noqa: PLR0913 - the four roles, each named
    rollout: Rollout,
    *,
    policy: Network,
    reference: Network,
    critic: Network,
    reward_model: Network,
    temperature: float,
    micro_batch_tokens: int,
    eos_rule: EosRule,
    eos_penalty: float,
    scores_policy: bool = True,
) -> Rollout:
    """Fill in logprobs, ref_logprobs, values and scores of a rollout.

    scores_policy: False takes the sampler's log-probs for the policy's, which then reads some
    responses again to check them. The temperature of sampling divides the logits here too. EOS
    rules, for a response that hit the length limit: "penalty" takes eos_penalty off its score,
    "replace" makes -eos_penalty its score, "none" leaves it.
    """
    batches = _pack(rollout, reference, micro_batch_tokens)
    scalar_batches = _pack(rollout, critic, micro_batch_tokens)  # its layout may be another
    # Language and scalar models in turn: while one is read, residency swaps the other pair.
    read_again = batches
    if not scores_policy:
        rollout.num_checked = -(-len(rollout) // CHECKED_SHARE)
        read_again = _pack(rollout, policy, micro_batch_tokens, rollout.num_checked)
    scored = _read(policy, read_again, rollout, temperature=temperature)
    rollout.logprobs = scored if scores_policy else rollout.sampled_logprobs
    rollout.checked_logprobs = scored
    readings = _read(critic, scalar_batches, rollout)
    # A value is read one token before its own; a prompt has at least one token, so none crosses
    # sequences.
    rollout.values = shift_right(readings).masked_fill(~rollout.response_mask, 0.0)
    rollout.ref_logprobs = _read(reference, batches, rollout, temperature=temperature)
    readings = _read(reward_model, scalar_batches, rollout)
    rollout.raw_scores = last_readings(rollout, readings)
    rollout.scores = apply_eos_rule(rollout.raw_scores, rollout.has_eos, eos_rule, eos_penalty)
    return rollout


def apply_eos_rule(scores: Tensor, has_eos: Tensor, rule: EosRule, penalty: float) -> Tensor:
    """Return the scores [B] with the rule applied where has_eos [B] is False; see score_rollout."""
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
    batches = _pack(rollout, network, micro_batch_tokens)
    return _read(network, batches, rollout, temperature=temperature)


def last_readings(rollout: Rollout, readings: Tensor) -> Tensor:
    """Return the reading [B] at the last token of every response: a reward model's score."""
    return readings[rollout.cu_seqlens[1:].long() - 1]


def rollout_metrics(rollout: Rollout, phase_seconds: dict[str, float]) -> dict[str, float]:
    """Return the numbers of phases 2 to 4, over the global rollout batch."""
    mask, count = rollout.response_mask, float(rollout.response_mask.sum())  # sync
    log_ratio = (rollout.logprobs - rollout.ref_logprobs)[mask].double()
    end = int(rollout.cu_seqlens[rollout.num_checked or len(rollout)])
    scored = rollout.checked_logprobs if rollout.num_checked else rollout.logprobs
    mismatch = (rollout.sampled_logprobs - scored)[:end][mask[:end]].abs()
    outside = torch.stack([rollout.rewards, rollout.advantages, rollout.returns])[:, ~mask]
    advantages = rollout.advantages[mask]
    return {
        "rollout/tokens_per_s": count / phase_seconds["rollout"],
        "rollout/response_tokens": count / len(rollout),
        "rollout/prompt_tokens": sum(rollout.prompt_lengths) / len(rollout),
        "rollout/eos_rate": float(rollout.has_eos.double().mean()),
        "rollout/length_spread": rollout.length_spread,
        "score/reward_mean": float(rollout.raw_scores.mean()),
        "score/reward_std": float(rollout.raw_scores.std()) if len(rollout) > 1 else 0.0,
        "score/kl": float(log_ratio.sum()) / len(rollout),
        "score/kl_per_token": float(log_ratio.mean()),
        "score/logprob_mismatch_mean": float(mismatch.mean()),
        "score/logprob_mismatch_max": float(mismatch.max()),
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std()) if count > 1 else 0.0,
        "advantage/value_mean": float(rollout.values[mask].mean()),
        "advantage/return_mean": float(rollout.returns[mask].mean()),
        "advantage/pad_leak": float(outside.abs().max()) if outside.numel() else 0.0,
        "update/tokens_per_s": len(rollout.tokens) / phase_seconds["update"],
        "time/step_seconds": sum(phase_seconds.values()),
    }


def _pack(
    rollout: Rollout, network: Network, micro_batch_tokens: int, count: int | None = None
) -> list[PackedBatch]:
    """Return this rank's share of a rollout, or of its first `count` responses, in the network's
    layout."""
    indices = list(range(len(rollout)))[:count]
    return pack_for(rollout.examples(), indices, network.parallel, micro_batch_tokens)


def _read(
    network: Network, batches: list[PackedBatch], rollout: Rollout, *, temperature: float = 1.0
) -> Tensor:
    """Return the network's output [T] in the rollout's order: each rank reads its share, and all
    sum up."""
    full = torch.zeros(len(rollout.tokens), device=rollout.tokens.device)
    starts = rollout.cu_seqlens[:-1].long()
    with network.present():
        outputs = forward(network, batches, temperature=temperature)
    for batch, output in zip(batches, outputs, strict=True):
        ids = torch.repeat_interleave(batch.sequence_ids, batch.cu_seqlens.diff().long())
        is_real = ids >= 0
        full[starts[ids[is_real]] + batch.positions[is_real]] = output[is_real]
    dist.all_reduce(full, group=network.parallel.dp_group)
    return full


def _join(prompts: Sequence[Example], responses: list[Response], parallel: Parallel) -> Rollout:
    """Lay prompts and responses end to end."""
    tokens = [
        np.concatenate([prompt.tokens, response.tokens])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    lengths = np.array([len(t) for t in tokens])
    prompt_lengths = np.array([len(p.tokens) for p in prompts])
    positions = np.concatenate([np.arange(n) for n in lengths])
    response_mask = positions >= np.repeat(prompt_lengths, lengths)
    sampled = np.zeros(len(positions), dtype=np.float32)
    sampled[response_mask] = np.concatenate([r.logprobs for r in responses])
    device = parallel.device
    return Rollout(
        tokens=torch.from_numpy(np.concatenate(tokens)).to(device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(
            device
        ),
        response_mask=torch.from_numpy(response_mask).to(device),
        sampled_logprobs=torch.from_numpy(sampled).to(device),
        has_eos=torch.tensor([r.has_eos for r in responses], device=device),
        prompt_lengths=prompt_lengths.tolist(),
    )
