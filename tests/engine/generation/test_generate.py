import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.batches import pack
from engine.data.examples import Example
from engine.errors import UserError
from engine.generation.block_manager import BlockManager
from engine.generation.generate import generate
from engine.generation.scheduler import Counts
from engine.generation.sequence import Response
from engine.settings.adam import AdamConfig
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.engine.generation.random_gpt2 import CONTEXT, VOCAB, load_gpt2, random_prompts


class Gathers(TorchDispatchMode):
    """Counts the numbers that operations pick by index."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("index_select", "index"):
            self.sizes.append(out.numel())
        return out


CONFIG = SamplingConfig(max_new_tokens=12, num_slots=8, temperature=0.7)
NO_EOS = -1


def responses(network: Network, prompts, config=CONFIG, **arguments) -> dict[int, Response]:
    arguments = {"eos_id": 0, "seed": 5} | arguments
    return {r.sample_index: r for r in generate(network, prompts, config, **arguments)}


def logits_after(network: Network, tokens: np.ndarray) -> torch.Tensor:
    """[n, V] logits after every token of one sequence, by a plain forward pass."""
    row = torch.from_numpy(tokens)
    sequences = PackedSequences.of(torch.tensor([0, len(row)], dtype=torch.int32), len(row))
    rows = torch.arange(len(row))
    (module,) = network.modules
    with torch.no_grad():
        return module(row, rows, sequences, Logits(rows))[:, :VOCAB]


def assert_same(actual: dict[int, Response], expected: dict[int, Response]) -> None:
    assert actual.keys() == expected.keys()
    for index, response in expected.items():
        assert actual[index].tokens.tolist() == response.tokens.tolist(), index
        assert actual[index].has_eos == response.has_eos
        assert np.allclose(actual[index].logprobs, response.logprobs, rtol=0, atol=2e-5)


def test_greedy_equals_huggingface_for_ragged_prompts(network, huggingface_greedy):
    config = SamplingConfig(max_new_tokens=8, temperature=0.0, num_slots=64)
    found = responses(network, random_prompts(64, 200), config)
    assert {i: r.tokens.tolist() for i, r in found.items()} == huggingface_greedy
    assert sum(len(tokens) for tokens in huggingface_greedy.values()) > 400


def test_greedy_with_the_cache_equals_greedy_without(network):
    config = dataclasses.replace(CONFIG, prefill_tokens=7, block_size=4).greedy()
    prompts = random_prompts(6, 40)
    for index, response in responses(network, prompts, config, eos_id=NO_EOS).items():
        tokens = np.concatenate([prompts[index], response.tokens])
        best = logits_after(network, tokens).argmax(1).numpy()
        assert best[len(prompts[index]) - 1 : -1].tolist() == response.tokens.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_trainer(network, temperature):
    prompts = random_prompts(12, 60)
    config = dataclasses.replace(CONFIG, temperature=temperature, top_k=20, min_new_tokens=3)
    found = responses(network, prompts, config)
    examples = [
        Example(tokens=np.concatenate([p, found[i].tokens]), prompt_length=len(p))
        for i, p in enumerate(prompts)
    ]
    batch = pack(examples, multiple_of=1)
    (logprobs,) = forward(network, [batch], temperature=temperature or 1.0)
    sampled = np.concatenate([found[i].logprobs for i in range(len(prompts))])
    assert np.abs(logprobs[batch.mask].numpy() - sampled).max() < 1e-5


def test_logprobs_in_bf16_are_close_to_the_trainers(gpt2_folder):
    network = load_gpt2(gpt2_folder, dtype="bf16")
    prompts = random_prompts(12, 60)
    found = responses(network, prompts, dataclasses.replace(CONFIG, temperature=1.0))
    examples = [
        Example(tokens=np.concatenate([p, found[i].tokens]), prompt_length=len(p))
        for i, p in enumerate(prompts)
    ]
    batch = pack(examples, multiple_of=1)
    (logprobs,) = forward(network, [batch])
    sampled = np.concatenate([found[i].logprobs for i in range(len(prompts))])
    assert 0 < np.abs(logprobs[batch.mask].numpy() - sampled).mean() < 5e-3


@pytest.mark.parametrize(
    ("change", "num_prompts"),
    [
        ({}, 20),
        ({"top_k": 7}, 20),
        ({"top_p": 0.8}, 20),
        ({"temperature": 1.5}, 20),
        pytest.param({"top_k": 40, "top_p": 0.6}, 1000, marks=pytest.mark.slow),
    ],
)
def test_draws_have_the_distribution_of_the_softmax(network, change, num_prompts):
    # Where a draw falls in its cumulative distribution is uniform: chi-square over 50 bins.
    config = dataclasses.replace(CONFIG, max_new_tokens=100, num_slots=128, **change)
    prompts = random_prompts(num_prompts, 4)
    found = responses(network, prompts, config, eos_id=NO_EOS)
    rng = np.random.default_rng(0)
    places = []
    for index, prompt in enumerate(prompts):
        tokens = found[index].tokens
        logits = logits_after(network, np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
        probabilities = truncated(logits.double() / config.temperature, config).softmax(1)
        chosen = probabilities.gather(1, torch.from_numpy(tokens)[:, None])[:, 0]
        assert (chosen > 0).all()
        below = (probabilities.cumsum(1).gather(1, torch.from_numpy(tokens)[:, None]))[:, 0]
        places.append((below - chosen * torch.from_numpy(rng.random(len(tokens)))).numpy())
    counts, _ = np.histogram(np.concatenate(places), bins=50, range=(0, 1))
    assert counts.sum() == 100 * num_prompts  # 2,000 draws; the slow one 100,000
    expected = counts.sum() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 94.6  # 49 degrees: p = 1e-4


def truncated(z: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The logits with those that top-k, then top-p take out at -inf."""
    order = z.argsort(1, descending=True)
    if config.top_k:
        z = z.scatter(1, order[:, config.top_k :], -torch.inf)
    mass = z.softmax(1).gather(1, order)
    is_out = mass.cumsum(1) - mass >= config.top_p
    return z.scatter(1, order, z.gather(1, order).masked_fill(is_out, -torch.inf))


@pytest.mark.parametrize(
    "change",
    [
        {"num_slots": 1},
        {"num_slots": 64},
        {"prefill_tokens": 9},
        {"block_size": 3},
        {"steps_per_sync": 5},
        {"steps_per_sync": 50, "num_slots": 3, "prefill_tokens": 20},
        {"block_size": 4, "cache_gib": 30 * 4 * 64 * 2 * 4 * 4 / 2**30},
    ],
)
def test_slots_chunks_and_preemption_change_nothing(network, change):
    prompts = random_prompts(14, 100)
    prompts += [prompts[1]] * 3 + [prompts[1][:50]]
    stops = tuple(range(1, 40))
    expected = responses(network, prompts, dataclasses.replace(CONFIG, stop_token_ids=stops))
    assert any(r.has_eos for r in expected.values())
    assert not all(r.has_eos for r in expected.values())
    counts = Counts()
    config = dataclasses.replace(CONFIG, stop_token_ids=stops, **change)
    assert_same(responses(network, prompts, config, counts=counts), expected)
    assert counts.num_sampled == sum(len(r.tokens) for r in expected.values())
    assert (counts.num_preempted > 0) == ("cache_gib" in change)


@pytest.mark.parametrize("prefill_tokens", [9, 1024])
def test_answers_to_one_prompt_copy_it_and_equal_those_that_share_its_blocks(
    network, prefill_tokens, monkeypatch
):
    config = dataclasses.replace(CONFIG, block_size=4, prefill_tokens=prefill_tokens)
    prompts = [prompt for prompt in random_prompts(4, 50) for _ in range(5)]
    counts = {"copied": Counts(), "shared": Counts()}
    copied = responses(network, prompts, config, counts=counts["copied"])
    monkeypatch.setattr(
        "engine.generation.generate._blocks_of",
        lambda shape: BlockManager(shape.num_blocks, shape.block_size),
    )
    shared = responses(network, prompts, config, counts=counts["shared"])
    assert_same(copied, shared)
    assert counts["copied"].num_shared > 10 * 8  # tokens; the prompts have up to 50
    assert counts["copied"].num_shared == counts["shared"].num_shared


def test_a_batch_of_one_length_gathers_no_keys_in_a_cache_with_room(network):
    prompts = [prompt[:20] for prompt in random_prompts(30, 60) if len(prompt) >= 20][:6]
    width = network.size.hidden_size  # numbers of a token's key

    def gathered(num_bytes: float) -> list[int]:
        """The largest tensors that are picked from the cache or copied to attend to them."""
        config = dataclasses.replace(CONFIG, cache_gib=num_bytes / 2**30, block_size=4)
        with Gathers() as gathers:
            found = responses(network, prompts, config, eos_id=NO_EOS)
        assert all(len(r.tokens) == 12 for r in found.values())
        return [size for size in gathers.sizes if size >= 6 * 20 * width]

    token_bytes = 2 * network.size.num_layers * width * 4
    assert len(prompts) == 6
    assert not gathered(2**30)
    # One token's worth too little for six sequences of 32: block by block.
    assert gathered((6 * 32 - 1) * token_bytes)


def test_a_response_depends_on_its_sample_index_and_the_seed(network):
    prompt = random_prompts(1, 30)[0]
    found = responses(network, [prompt] * 3, sample_indices=[7, 2**40, 9])
    alone = responses(network, [prompt], sample_indices=[2**40])
    assert_same({2**40: found[2**40]}, alone)
    texts = [tuple(r.tokens) for r in found.values()]
    texts.append(tuple(responses(network, [prompt], sample_indices=[7], seed=6)[7].tokens))
    assert len(set(texts)) == 4


def test_a_rollout_that_was_cut_off_goes_on_with_the_same_draws(network):
    prompts = random_prompts(10, 40)
    expected = responses(network, prompts)
    stream = generate(network, prompts, CONFIG, eos_id=0, seed=5)
    done = {r.sample_index: r for r in (next(stream), next(stream), next(stream))}
    stream.close()
    rest = [index for index in range(10) if index not in done]
    done |= responses(network, [prompts[i] for i in rest], sample_indices=rest)
    assert_same(done, expected)


def test_responses_come_as_they_finish_and_tokens_before_them(network):
    heard: dict[int, list[int]] = {}
    prompts = random_prompts(3, 5)

    def listen(index: int, tokens: list[int]) -> None:
        heard.setdefault(index, []).extend(tokens)

    stream = generate(
        network,
        prompts,
        CONFIG,
        eos_id=NO_EOS,
        seed=5,
        max_new_tokens=[9, 2, 5],
        on_tokens=listen,
    )
    order = []
    for response in stream:
        order.append((response.sample_index, len(response.tokens)))
        assert heard[response.sample_index] == response.tokens.tolist()
    assert order == [(1, 2), (2, 5), (0, 9)]


def test_stop_tokens_end_a_response_and_wait_for_min_new_tokens(network):
    prompts = random_prompts(40, 5)
    stops = tuple(range(1, 40))
    plain = responses(network, prompts, dataclasses.replace(CONFIG, stop_token_ids=stops))
    assert all(set(r.tokens[:-1]).isdisjoint({0, *stops}) for r in plain.values())
    assert {r.has_eos for r in plain.values()} == {True, False}
    assert min(len(r.tokens) for r in plain.values()) == 1
    later = dataclasses.replace(CONFIG, stop_token_ids=stops, min_new_tokens=4)
    found = responses(network, prompts, later)
    assert min(len(r.tokens) for r in found.values()) == 5
    unmoved = [i for i, r in plain.items() if len(r.tokens) > 4]
    assert_same({i: found[i] for i in unmoved}, {i: plain[i] for i in unmoved})


def test_responses_end_where_the_context_does(network):
    prompt = random_prompts(2, CONTEXT - 3)[1]
    (response,) = responses(network, [prompt], eos_id=NO_EOS).values()
    assert len(response.tokens) == 3
    assert not response.has_eos


def test_no_prompts_give_no_responses(network):
    assert responses(network, []) == {}


def test_the_network_trains_again_after_generation(network):
    Optimizer(network, AdamConfig(), total_steps=1)
    stream = generate(network, random_prompts(2, 5), CONFIG, eos_id=0, seed=5)
    next(stream)
    assert not any(m.training for module in network.modules for m in module.modules())
    stream.close()
    assert all(m.training for module in network.modules for m in module.modules())
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompts", "change", "match"),
    [
        ([[]], {}, "sample 0 is empty"),
        ([[1], [2] * CONTEXT], {}, "sample 1 has 224 tokens"),
        ([[1]], {"max_new_tokens": 0}, "--sampling.max-new-tokens must"),
        ([[1]], {"cache_gib": 1e-9}, "cache has room for 0 tokens"),
    ],
)
def test_bad_input_is_an_error_at_the_call(network, prompts, change, match):
    rows = [np.array(prompt, dtype=np.int64) for prompt in prompts]
    with pytest.raises(UserError, match=match):
        generate(network, rows, dataclasses.replace(CONFIG, **change), eos_id=0, seed=5)


def test_a_prompt_limit_below_one_is_an_error(network):
    with pytest.raises(UserError, match="sample 0"):
        generate(network, [np.array([1])], CONFIG, eos_id=0, seed=5, max_new_tokens=[0])


def test_repeated_sample_indices_are_an_error(network):
    with pytest.raises(ValueError, match="different sample indices"):
        generate(network, [np.array([1])] * 2, CONFIG, eos_id=0, seed=5, sample_indices=[3, 3])


def test_a_scalar_network_generates_nothing(network):
    scalar = build_network("scalar", network.size, network.parallel, numerics=Numerics())
    with pytest.raises(ValueError, match="scalar"):
        generate(scalar, [np.array([1])], CONFIG, eos_id=0, seed=5)


def test_nan_in_the_weights_is_an_error_that_names_the_sample(network):
    next(network.modules[0].parameters()).data[7] = torch.nan  # only where token 7 is read
    prompts = [np.array([1, 2]), np.array([1, 7])]
    with pytest.raises(FloatingPointError, match="sample"):
        responses(network, prompts)


def test_weights_that_change_under_way_are_an_error(network):
    stream = generate(network, random_prompts(9, 5), CONFIG, eos_id=0, seed=5)
    next(stream)
    network.mark_changed()
    with pytest.raises(RuntimeError, match="weights changed"):
        list(stream)


def test_an_optimizer_step_is_a_new_version_of_the_weights(network):
    optimizer = Optimizer(network, AdamConfig(), total_steps=1)
    before = network.weights_version
    optimizer.zero_gradients()
    optimizer.step(0)
    assert network.weights_version == before + 1


def test_the_padding_of_the_vocabulary_is_never_drawn(network):
    # Rows of the padding that would win every draw.
    (module,) = network.modules
    module.shared_embedding_or_output_weight().data[VOCAB:] = 100.0
    found = responses(network, random_prompts(20, 20), eos_id=NO_EOS)
    assert max(r.tokens.max() for r in found.values()) < VOCAB
