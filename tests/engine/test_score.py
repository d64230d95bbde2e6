import dataclasses

import numpy as np
import pytest
import torch

from engine.advantage import Advantages
from engine.data.examples import Example
from engine.feed import pack_for
from engine.ranks.start import start_parallel
from engine.rollout import Rollout, generate_rollout
from engine.score import Scored, apply_eos_rule, read_rollout, score_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.training.network import Network
from tests.engine.sampled import EOS, SAMPLING, prompts, sample
from tests.tiny import random_network


@pytest.fixture
def policy() -> Network:
    return random_network("language", start_parallel(ParallelLayout(), seed=1))


def score(rollout: Rollout, policy: Network, **changes: object) -> Scored:
    """Score by networks of different seeds; changes are of these, or of the config."""
    parallel = policy.parallel
    roles = {
        "policy": policy,
        "reference": random_network("language", parallel, seed=1),
        "critic": random_network("scalar", parallel, seed=2),
        "reward_model": random_network("scalar", parallel, seed=3),
    }
    config = PPOConfig(micro_batch_tokens=40, policy_logprobs="scored")
    settings = {name: value for name, value in changes.items() if name not in roles}
    roles |= {name: value for name, value in changes.items() if name in roles}
    return score_rollout(rollout, dataclasses.replace(config, **settings), **roles)


def test_trainer_agrees_with_the_sampler(policy: Network):
    rollout = sample(policy)
    scored = score(rollout, policy)
    torch.testing.assert_close(scored.logprobs, rollout.sampled_logprobs, rtol=0, atol=1e-5)
    assert scored.num_checked == len(rollout)
    assert (scored.ref_logprobs - scored.logprobs)[rollout.response_mask].abs().min() > 0


def test_sampled_log_probs_are_taken_and_some_are_checked(policy: Network):
    rollout = sample(policy)
    scored = score(rollout, policy, reference=policy, policy_logprobs="sampled")
    assert scored.logprobs is rollout.sampled_logprobs
    assert (scored.logprobs - scored.ref_logprobs).abs().max() < 1e-5
    assert 1 <= scored.num_checked < len(rollout)
    end = int(rollout.cu_seqlens[scored.num_checked])
    assert (scored.logprobs - scored.checked_logprobs)[:end].abs().max() < 1e-5
    assert scored.checked_logprobs[end:].eq(0).all()


def test_sampling_temperature_divides_the_trainers_logits(policy: Network):
    warm = dataclasses.replace(SAMPLING, temperature=1.7)
    rollout = generate_rollout(policy, prompts(), warm, eos_id=EOS, seed=3, first_sample_index=0)
    scored = score(rollout, policy, sampling=warm, reference=policy)
    torch.testing.assert_close(scored.logprobs, rollout.sampled_logprobs, rtol=0, atol=1e-5)
    assert torch.equal(scored.ref_logprobs, scored.logprobs)  # the KL to itself is 0


def test_every_network_reads_batches_of_its_own_layout(policy: Network, monkeypatch):
    """The critic's layout may be another than the policy's; here its ranks are told apart."""
    asked = []
    elsewhere = dataclasses.replace(policy.parallel, seed=99)
    critic = dataclasses.replace(random_network("scalar", policy.parallel), parallel=elsewhere)

    def note(examples, parallel, budget):
        asked.append((len(examples), parallel.seed))
        return pack_for(examples, parallel, budget)

    monkeypatch.setattr("engine.score.pack_for", note)
    rollout = sample(policy)
    score(rollout, policy, critic=critic, policy_logprobs="sampled")
    assert asked == [(8, 1), (8, 99), (1, 1)]


def test_values_are_read_before_their_tokens_and_scores_at_the_last(policy: Network):
    critic = random_network("scalar", policy.parallel, seed=2)
    rollout = sample(policy)
    scored = score(rollout, policy, critic=critic, reward_model=critic)
    readings = read_rollout(critic, rollout, 1000)
    where = rollout.response_mask.nonzero()[:, 0]
    torch.testing.assert_close(scored.values[where], readings[where - 1])
    assert (scored.values[~rollout.response_mask] == 0).all()
    last = rollout.cu_seqlens[1:].long() - 1
    torch.testing.assert_close(scored.raw_scores, readings[last])


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
    scored = score(rollout, policy, eos_rule="penalty", eos_penalty=2.0)
    assert torch.equal(scored.raw_scores, plain)
    expected = plain - 2.0 * (~rollout.has_eos).float()
    torch.testing.assert_close(scored.scores, expected)


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
    columns = {name: torch.tensor(values) for name, values in numbers.items()}
    rollout = Rollout(
        examples=[Example(tokens=np.arange(3), prompt_length=n) for n in (1, 2)],
        cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        response_mask=mask,
        has_eos=torch.tensor([True, False]),
        sampled_logprobs=columns["sampled_logprobs"],
    )
    scored = Scored(
        raw_scores=torch.tensor([1.0, 4.0]),
        scores=torch.tensor([0.0, 0.0]),
        num_checked=2,
        **{name: columns[name] for name in ("logprobs", "ref_logprobs", "values")},
    )
    advantages = Advantages(
        whitening=None,
        kl_coef=0.02,
        kl=columns["logprobs"] - columns["ref_logprobs"],
        **{name: columns[name] for name in ("rewards", "advantages", "returns")},
    )
    found = rollout.metrics(0.5) | scored.metrics(rollout)
    found |= advantages.metrics(rollout, scored)
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
    }
    advantages.returns[4] = -0.5
    assert advantages.metrics(rollout, scored)["advantage/pad_leak"] == 0.5
    # Where one response was read again, only that one is compared.
    read_again = columns["sampled_logprobs"] + torch.tensor([0.0, 0.1, 0.3, 0.0, 0.0, 9.0])
    few = dataclasses.replace(scored, checked_logprobs=read_again, num_checked=1).metrics(rollout)
    assert few["score/logprob_mismatch_mean"] == pytest.approx(0.2)
    assert few["score/logprob_mismatch_max"] == pytest.approx(0.3)
