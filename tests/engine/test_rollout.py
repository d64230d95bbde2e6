import dataclasses

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rollout import Rollout, generate_rollout
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
