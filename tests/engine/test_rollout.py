import dataclasses

import pytest
import torch

from engine.ranks.start import start_parallel
from engine.rollout import generate_rollout
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from tests.engine.sampled import EOS, SAMPLING, prompts, sample, tokens_of
from tests.tiny import random_network


@pytest.fixture
def policy() -> Network:
    return random_network("language", start_parallel(ParallelLayout(), seed=1))


def test_rollout_holds_prompts_and_responses_in_order(policy: Network):
    rollout = sample(policy)
    assert len(rollout) == 8
    assert rollout.cu_seqlens.dtype == torch.int32
    bounds = rollout.cu_seqlens.tolist()
    for i, prompt in enumerate(prompts()):
        tokens, mask = (
            x[bounds[i] : bounds[i + 1]] for x in (tokens_of(rollout), rollout.response_mask)
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


def test_responses_carry_their_own_tokens_numbers(policy: Network):
    rollout = sample(policy)
    numbers = torch.arange(rollout.num_tokens)
    carried = [example.fields["n"] for example in rollout.carrying({"n": numbers})]
    assert [len(each) for each in carried] == [len(e.tokens) for e in rollout.examples]
    assert [n for each in carried for n in each] == numbers.tolist()


def test_draws_are_keyed_by_seed_and_sample_index(policy: Network):
    first = sample(policy)
    assert torch.equal(tokens_of(sample(policy)), tokens_of(first))
    for changes in ({"seed": 4}, {"first_sample_index": 48}):
        other = sample(policy, **changes)
        assert not torch.equal(tokens_of(other), tokens_of(first))
    few_slots = dataclasses.replace(SAMPLING, num_slots=1)
    again = generate_rollout(
        policy, prompts(), few_slots, eos_id=EOS, seed=3, first_sample_index=40
    )
    assert torch.equal(tokens_of(again), tokens_of(first))
