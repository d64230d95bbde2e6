"""What a network keeps between rollouts, and when it may not be used again."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.generation.cache import num_lanes
from engine.generation.cache_memory import PassingMemory
from engine.generation.decoding import Decoding
from engine.generation.generate import generate
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from tests.engine.generation.random_gpt2 import random_prompts
from tests.engine.generation.recorded import DoneAgain, record_steps

CONFIG = SamplingConfig(max_new_tokens=9, num_slots=6, temperature=0.7, steps_per_sync=4)
Answers = dict[int, tuple[list[int], np.ndarray]]


def answers(
    network: Network, config: SamplingConfig = CONFIG, *, seed: int = 3, prompt_seed: int = 0
) -> Answers:
    prompts = random_prompts(8, 40, prompt_seed)
    found = generate(network, prompts, config, eos_id=0, seed=seed)
    return {r.sample_index: (r.tokens.tolist(), r.logprobs) for r in found}


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    for index, (tokens, logprobs) in expected.items():
        assert found[index][0] == tokens, index
        assert np.allclose(found[index][1], logprobs, rtol=0, atol=2e-5)


@pytest.fixture
def decoding(network):
    return record_steps(network)


@pytest.fixture
def plain(gpt2_folder):
    """The same network, which records nothing."""
    from tests.engine.generation.random_gpt2 import load_gpt2

    return load_gpt2(gpt2_folder)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 20, "top_p": 0.9, "min_new_tokens": 3, "stop_token_ids": (7, 200)},
        {"steps_per_sync": 1, "num_slots": 3},
    ],
)
def test_recorded_steps_answer_as_others_do(network, plain, decoding, change):
    config = dataclasses.replace(CONFIG, **change)
    assert_same(answers(network, config), answers(plain, config))
    assert decoding.graphs


def test_a_step_that_copies_a_prompt_is_not_a_recorded_one(network, plain, decoding):
    # The first answer ends while the second goes on. The third gets its place, copies the second's
    # prompt but for one token, and decodes at once: a step of decoding rows alone.
    prompts = [np.arange(17), np.arange(1, 18), np.arange(1, 18)]
    limits = {"eos_id": -1, "seed": 3, "max_new_tokens": [2, 8, 6]}
    config = dataclasses.replace(CONFIG, num_slots=2, steps_per_sync=1)
    found, expected = (
        {r.sample_index: (r.tokens.tolist(), r.logprobs) for r in answered}
        for answered in (generate(n, prompts, config, **limits) for n in (network, plain))
    )
    assert_same(found, expected)
    assert decoding.graphs


def test_the_next_rollout_records_nothing_and_has_a_seed_of_its_own(network, plain, decoding):
    for prompt_seed in (0, 1):
        answers(network, prompt_seed=prompt_seed)
    kept = dict(decoding.graphs)
    assert_same(answers(network), answers(plain))
    assert decoding.graphs == kept
    expected = answers(plain, seed=4, prompt_seed=1)
    assert_same(answers(network, seed=4, prompt_seed=1), expected)
    assert kept.items() <= decoding.graphs.items()
    assert expected[1][0] != answers(plain, prompt_seed=1)[1][0]  # the seed matters


def test_more_slots_record_what_they_lack_and_keep_the_rest(network, plain, decoding):
    # Eight blocks, four a sequence: what is done again on the CPU knows their number.
    config = dataclasses.replace(CONFIG, cache_gib=8 * 32768 / 2**30)
    answers(network, dataclasses.replace(config, num_slots=2))
    few = dict(decoding.graphs)
    assert_same(answers(network, config), answers(plain, config))
    assert few.items() < decoding.graphs.items()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.9},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_new_tokens": 2},
        {"stop_token_ids": (5,)},
        {"block_size": 8},
    ],
)
def test_other_settings_are_recorded_anew(network, plain, decoding, change):
    answers(network)
    old = list(decoding.graphs.values())
    config = dataclasses.replace(CONFIG, **change)
    assert_same(answers(network, config), answers(plain, config))
    assert not any(graph in old for graph in decoding.graphs.values())


def move(network: Network) -> None:
    """Put a weight elsewhere, as a swap that frees and takes memory does."""
    parameter = next(network.modules[0].decoder.layers[1].parameters())
    parameter.data = parameter.data.clone()


def test_graphs_go_when_weights_have_moved(network, plain, decoding):
    answers(network)
    old = list(decoding.graphs.values())
    move(network)
    assert_same(answers(network), answers(plain))
    assert not any(graph in old for graph in decoding.graphs.values())


def test_weights_that_move_meanwhile_are_an_error(network, decoding):
    stream = generate(network, random_prompts(8, 40), CONFIG, eos_id=0, seed=3)
    next(stream)
    move(network)
    with pytest.raises(RuntimeError, match="weights moved in memory"):
        list(stream)
    assert not decoding.is_open


def test_graphs_end_with_memory_that_does(network, plain):
    memory = PassingMemory(torch.device("cpu"), num_lanes=num_lanes(network))
    network.keep(Decoding(memory, DoneAgain))
    for seed in (3, 4):
        assert_same(answers(network, seed=seed), answers(plain, seed=seed))
        assert not network.decoding.graphs


def test_settings_can_do_without_graphs(network, decoding):
    answers(network, dataclasses.replace(CONFIG, cuda_graphs=False))
    assert not decoding.graphs


def test_memory_is_given_back_however_a_rollout_ends(network, decoding):
    stream = generate(network, random_prompts(8, 40), CONFIG, eos_id=0, seed=3)
    assert not decoding.memory.is_taken  # nobody has asked for a response yet
    next(stream)
    assert decoding.memory.is_taken
    stream.close()
    assert not decoding.memory.is_taken
    answers(network)
    assert not decoding.memory.is_taken
    network.modules[0].decoder.layers[0].mlp.linear_fc1.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        answers(network)
    assert not decoding.memory.is_taken


def test_two_rollouts_at_a_time_do_not_share_a_cache(network, plain, decoding):
    prompts = random_prompts(8, 40)
    streams = [generate(network, prompts, CONFIG, eos_id=0, seed=seed) for seed in (3, 4)]
    found: list[Answers] = [{}, {}]
    for pair in zip(*streams, strict=True):
        for answer, response in zip(found, pair, strict=True):
            answer[response.sample_index] = (response.tokens.tolist(), response.logprobs)
    for answer, seed in zip(found, (3, 4), strict=True):
        assert_same(answer, answers(plain, seed=seed))


def test_the_networks_mode_is_put_back_behind_the_last_of_its_readers(network, decoding):
    network.train(True)
    first, second = (
        generate(network, random_prompts(8, 40), CONFIG, eos_id=0, seed=seed) for seed in (1, 2)
    )
    next(first), next(second)
    list(first)
    assert not network.chunks[0].training
    list(second)
    assert network.chunks[0].training
    network.train(False)


def test_an_interrupt_while_the_cache_is_made_leaves_its_memory_free(
    network, decoding, monkeypatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engine.generation.cache.CacheShape.build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answers(network)
    assert not decoding.is_open
    assert_same(answers(network), answers(network))
