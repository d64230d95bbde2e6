import dataclasses

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rollout import (
    Rollout,
    apply_eos_rule,
    generate_rollout,
    last_readings,
    read_rollout,
    rollout_metrics,
    score_rollout,
)
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from tests.tiny import random_network

EOS = 0
SAMPLING = SamplingConfig(max_new_tokens=12, num_slots=3, cache_gib=0.01)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@pytest.fixture
def policy(parallel: Parallel) -> Network:
    return random_network("language", parallel)


def prompts() -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = (3, 11, 1, 7, 4, 20, 2, 9)
    return [Example(tokens=draw.integers(1, 100, n), prompt_length=n) for n in lengths]


def sample(policy: Network, **changes: object) -> Rollout:
    arguments = {"eos_id": EOS, "seed": 3, "first_sample_index": 40}
    return generate_rollout(policy, prompts(), SAMPLING, **(arguments | changes))


def score(rollout: Rollout, policy: Network, **changes: object) -> Rollout:
    parallel = policy.parallel
    arguments = {
        "policy": policy,
        "reference": random_network("language", parallel, seed=1),
        "critic": random_network("scalar", parallel, seed=2),
        "reward_model": random_network("scalar", parallel, seed=3),
        "temperature": 1.0,
        "micro_batch_tokens": 40,
        "eos_rule": "none",
        "eos_penalty": 1.0,
    }
    return score_rollout(rollout, **(arguments | changes))


def test_rollout_holds_prompts_and_responses_in_order(policy: Network):
    rollout = sample(policy)
    assert len(rollout) == 8
    assert rollout.cu_seqlens.dtype == torch.int32
    bounds = rollout.cu_seqlens.tolist()
    for i, prompt in enumerate(prompts()):
        tokens, mask = (
            x[bounds[i] : bounds[i + 1]] for x in (rollout.tokens, rollout.response_mask)
        )
        length = len(prompt.tokens)
        assert tokens[:length].tolist() == prompt.tokens.tolist()
        assert mask.tolist() == [False] * length + [True] * rollout.response_lengths[i]
        assert 1 <= rollout.response_lengths[i] <= 12
        assert rollout.has_eos[i] == (tokens[-1] == EOS)
        assert (tokens[length:-1] != EOS).all()
        assert rollout.has_eos[i] or rollout.response_lengths[i] == 12
    assert 0 < rollout.has_eos.sum() < 8  # both cases were seen
    assert (rollout.sampled_logprobs[~rollout.response_mask] == 0).all()
    assert (rollout.sampled_logprobs[rollout.response_mask] < 0).all()


def test_draws_are_keyed_by_seed_and_sample_index(policy: Network):
    first = sample(policy)
    assert torch.equal(sample(policy).tokens, first.tokens)
    for changes in ({"seed": 4}, {"first_sample_index": 48}):
        other = sample(policy, **changes)
        assert other.tokens.shape != first.tokens.shape or (other.tokens != first.tokens).any()
    few_slots = dataclasses.replace(SAMPLING, num_slots=1)
    again = generate_rollout(
        policy, prompts(), few_slots, eos_id=EOS, seed=3, first_sample_index=40
    )
    assert torch.equal(again.tokens, first.tokens)


def test_trainer_agrees_with_the_sampler(policy: Network):
    rollout = score(sample(policy), policy)
    torch.testing.assert_close(rollout.logprobs, rollout.sampled_logprobs, rtol=0, atol=1e-5)
    assert (rollout.ref_logprobs - rollout.logprobs)[rollout.response_mask].abs().min() > 0


def test_sampled_log_probs_are_taken_and_some_are_checked(policy: Network):
    rollout = score(sample(policy), policy, reference=policy, scores_policy=False)
    assert rollout.logprobs is rollout.sampled_logprobs
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() < 1e-5
    assert 1 <= rollout.num_checked < len(rollout)
    end = int(rollout.cu_seqlens[rollout.num_checked])
    assert (rollout.logprobs - rollout.checked_logprobs)[:end].abs().max() < 1e-5
    assert rollout.checked_logprobs[end:].eq(0).all()
    first = rollout.examples()[0]
    assert np.array_equal(first.fields["logprobs"], rollout.logprobs[: len(first.tokens)])


def test_sampling_temperature_divides_the_trainers_logits(policy: Network):
    warm = dataclasses.replace(SAMPLING, temperature=1.7)
    rollout = generate_rollout(policy, prompts(), warm, eos_id=EOS, seed=3, first_sample_index=0)
    score(rollout, policy, temperature=1.7)
    torch.testing.assert_close(rollout.logprobs, rollout.sampled_logprobs, rtol=0, atol=1e-5)


def test_values_are_read_before_their_tokens_and_scores_at_the_last(policy: Network):
    critic = random_network("scalar", policy.parallel, seed=2)
    rollout = score(sample(policy), policy, critic=critic, reward_model=critic)
    readings = read_rollout(critic, rollout, 1000)
    where = rollout.response_mask.nonzero()[:, 0]
    torch.testing.assert_close(rollout.values[where], readings[where - 1])
    assert (rollout.values[~rollout.response_mask] == 0).all()
    last = rollout.cu_seqlens[1:].long() - 1
    torch.testing.assert_close(rollout.raw_scores, readings[last])
    assert torch.equal(last_readings(rollout, readings), readings[last])


def test_budget_of_micro_batches_changes_no_reading(policy: Network):
    rollout = sample(policy)
    for kind in ("language", "scalar"):
        network = random_network(kind, policy.parallel, seed=5)
        one_by_one, together = (read_rollout(network, rollout, n) for n in (1, 10_000))
        torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
        assert one_by_one.abs().max() > 0.1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("none", [2.0, 5.0]), ("penalty", [2.0, 3.5]), ("replace", [2.0, -1.5])],
)
def test_eos_rules(rule: str, expected: list[float]):
    scores, has_eos = torch.tensor([2.0, 5.0]), torch.tensor([True, False])
    assert apply_eos_rule(scores, has_eos, rule, 1.5).tolist() == expected
    assert scores.tolist() == [2.0, 5.0]


def test_eos_rule_changes_scores_and_keeps_what_the_reward_model_said(policy: Network):
    rollout = sample(policy)
    plain = score(rollout, policy).raw_scores
    score(rollout, policy, eos_rule="penalty", eos_penalty=2.0)
    assert torch.equal(rollout.raw_scores, plain)
    expected = plain - 2.0 * (~rollout.has_eos).float()
    torch.testing.assert_close(rollout.scores, expected)


def test_examples_carry_what_the_losses_read(policy: Network):
    rollout = score(sample(policy), policy)
    assert sorted(rollout.examples()[0].fields) == ["logprobs", "values"]
    rollout.advantages, rollout.returns = rollout.values + 1, rollout.values + 2
    examples = rollout.examples()
    assert sorted(examples[0].fields) == ["advantages", "logprobs", "returns", "values"]
    bounds = rollout.cu_seqlens.tolist()
    for i, example in enumerate(examples):
        part = slice(bounds[i], bounds[i + 1])
        assert example.tokens.tolist() == rollout.tokens[part].tolist()
        assert example.prompt_length == rollout.prompt_lengths[i]
        np.testing.assert_array_equal(example.fields["returns"], rollout.returns[part].numpy())


def test_metrics_by_hand():
    mask = torch.tensor([False, True, True, False, False, True])
    numbers = {
        "sampled_logprobs": [0.0, -1.0, -2.0, 0.0, 0.0, -3.0],
        "logprobs": [9.0, -1.5, -2.0, 9.0, 9.0, -3.25],  # prompts hold what must not count
        "ref_logprobs": [0.0, -2.0, -3.0, 0.0, 0.0, -2.0],
        "values": [0.0, 1.0, 2.0, 0.0, 0.0, 6.0],
        "rewards": [0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        "advantages": [0.0, 1.0, 2.0, 0.0, 0.0, 6.0],
        "returns": [0.0, 2.0, 4.0, 0.0, 0.0, 12.0],
    }
    rollout = Rollout(
        tokens=torch.zeros(6, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        response_mask=mask,
        has_eos=torch.tensor([True, False]),
        prompt_lengths=[1, 2],
        raw_scores=torch.tensor([1.0, 4.0]),
        scores=torch.tensor([0.0, 0.0]),
        **{name: torch.tensor(values) for name, values in numbers.items()},
    )
    seconds = {"rollout": 0.5, "score": 1.0, "advantage": 0.25, "update": 2.0}
    found = rollout_metrics(rollout, seconds)
    assert found == {
        "rollout/tokens_per_s": 6.0,
        "rollout/response_tokens": 1.5,
        "rollout/prompt_tokens": 1.5,
        "rollout/eos_rate": 0.5,
        "rollout/length_spread": 1.0,
        "score/reward_mean": 2.5,
        "score/reward_std": pytest.approx(4.5**0.5),
        "score/kl": pytest.approx((0.5 + 1.0 - 1.25) / 2),  # a response: the sum of its tokens
        "score/kl_per_token": pytest.approx(0.25 / 3),
        "score/logprob_mismatch_mean": pytest.approx(0.25),
        "score/logprob_mismatch_max": pytest.approx(0.5),
        "advantage/mean": 3.0,
        "advantage/std": pytest.approx(7.0**0.5),
        "advantage/value_mean": 3.0,
        "advantage/return_mean": 6.0,
        "advantage/pad_leak": 0.0,
        "update/tokens_per_s": 3.0,
        "time/step_seconds": 3.75,
    }
    rollout.returns[4] = -0.5
    assert rollout_metrics(rollout, seconds)["advantage/pad_leak"] == 0.5
