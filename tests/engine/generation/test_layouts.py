"""The same responses whatever the layout: every rank of a replica gets all of its own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.batches import deal
from engine.errors import UserError
from engine.generation.generate import generate
from engine.generation.sequence import Response
from engine.residency.refit import Refit
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from tests.engine.generation.random_gpt2 import CONTEXT, load_gpt2, random_prompts
from tests.engine.generation.recorded import record_steps
from tests.ranks import run_ranks

LAYOUTS = {
    "tp2": ParallelLayout(tp=2),
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "pp2": ParallelLayout(pp=2),
    "pp2_virtual": ParallelLayout(pp=2, virtual_pp=2),
    "dp2": ParallelLayout(),
}
SAMPLED = SamplingConfig(max_new_tokens=6, num_slots=4, temperature=0.7, prefill_tokens=50)
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)
CONFIGS = {
    "sampled": SAMPLED,
    "truncated": dataclasses.replace(SAMPLED, top_k=20, top_p=0.9, min_new_tokens=3),
    "preempted": dataclasses.replace(SAMPLED, block_size=4, num_slots=64, cache_gib=1.5e-4),
}
KEYS = {"eos_id": 0, "seed": 3}
Outcome = dict[int, tuple[list[int], np.ndarray, bool]]


def outcome(network: Network, config: SamplingConfig) -> Outcome:
    """What this rank's replica answers to its share of the prompts."""
    prompts = random_prompts(8, 60) + random_prompts(2, 60)
    parallel = network.parallel
    mine = deal([len(prompt) for prompt in prompts], parallel.dp)[parallel.dp_rank]
    found: list[Response] = list(
        generate(
            network,
            [prompts[index] for index in mine],
            config,
            eos_id=0,
            seed=3,
            sample_indices=mine,
        )
    )
    return {r.sample_index: (r.tokens.tolist(), r.logprobs, r.has_eos) for r in found}


def outcomes_in_layouts(folder: Path) -> dict[str, dict[str, Outcome]]:
    found = {}
    for name, layout in LAYOUTS.items():
        network = load_gpt2(folder, layout)
        found[name] = {kind: outcome(network, config) for kind, config in CONFIGS.items()}
        decoding = record_steps(network)  # graphs, wherever a layout has collectives or messages
        found[name]["recorded"] = outcome(network, SAMPLED)
        assert decoding.graphs
        network.keep(None)
        if name in ("tp2", "pp2"):
            prompts = random_prompts(64, 200)
            responses = generate(network, prompts, GREEDY, eos_id=0, seed=3)
            found[name]["greedy"] = {r.sample_index: r.tokens.tolist() for r in responses}
        if name in ("tp2", "pp2", "pp2_virtual"):
            assert_bad_input_ends_every_rank(network)
            assert_readers_may_leave(network)
    return found


def assert_bad_input_ends_every_rank(network: Network) -> None:
    """Errors, not waits, on every rank; the ranks agree afterwards and go on."""
    mistakes = [
        ([np.array([], dtype=np.int64)], SAMPLED, "is empty"),
        ([np.arange(CONTEXT)], SAMPLED, "no room"),
        ([np.arange(9)], dataclasses.replace(SAMPLED, max_new_tokens=0), "max-new-tokens"),
        ([np.arange(9)], dataclasses.replace(SAMPLED, cache_gib=1e-9), "room for 0 tokens"),
    ]
    for prompts, config, words in mistakes:
        with pytest.raises(UserError, match=words):
            generate(network, prompts, config, eos_id=0, seed=3)
    weights = [p for module in network.modules for p in module.parameters()]
    kept = [p.detach().clone() for p in weights]
    for parameter in weights:
        parameter.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        outcome(network, SAMPLED)
    for parameter, value in zip(weights, kept, strict=True):
        parameter.data.copy_(value)
    outcome(network, dataclasses.replace(SAMPLED, max_new_tokens=1))
    # Of two cohorts in flight the second alone is broken, when the first is on its way again.
    first = network.modules[0]
    if first.pre_process:
        first.embedding.word_embeddings.weight.data[5, 0] = torch.inf
    prompts = [np.full(12, 9), np.full(8, 5)]
    with pytest.raises(FloatingPointError, match="not finite"):
        list(generate(network, prompts, dataclasses.replace(SAMPLED, num_slots=2), **KEYS))
    for parameter, value in zip(weights, kept, strict=True):
        parameter.data.copy_(value)
    outcome(network, dataclasses.replace(SAMPLED, max_new_tokens=1))


def assert_readers_may_leave(network: Network) -> None:
    """After any number of responses, in the middle of a round too; the next rollout is sound."""
    expected = outcome(network, SAMPLED)
    few = dataclasses.replace(SAMPLED, num_slots=2)
    for count in range(8):
        responses = generate(network, random_prompts(8, 60), few, **KEYS)
        for _ in range(count):
            next(responses)
        responses.close()
    assert_same(outcome(network, SAMPLED), expected)


def outcomes_after_refit(folder: Path) -> dict[str, Outcome | str | int]:
    source = load_gpt2(folder, ParallelLayout(pp=2))
    found: dict[str, Outcome | str | int] = {}
    for name, layout in (("tp2", LAYOUTS["tp2_sequence"]), ("dp2", LAYOUTS["dp2"])):
        refit = Refit(source, layout, numerics=Numerics())
        report = refit()
        assert report.seconds > 0
        found[name] = outcome(refit.network, SAMPLED)
        found[f"{name}_bytes"] = report.received_bytes
    found["source"] = outcome(source, SAMPLED)  # its own groups are still the ones in use
    source.mark_changed()
    with pytest.raises(RuntimeError, match="stale weights"):
        outcome(refit.network, SAMPLED)
    for parameter in source.modules[0].parameters():
        parameter.data.mul_(0.5)
    refit()
    found["halved_dp2"] = outcome(refit.network, SAMPLED)
    found["halved_source"] = outcome(source, SAMPLED)
    with refit.filled() as copy:
        assert copy is refit.network
        found["filled_dp2"] = outcome(copy, SAMPLED)
    assert refit.num_bytes == 0
    with pytest.raises(RuntimeError, match="stale weights"):
        outcome(refit.network, SAMPLED)  # its memory is gone
    return found


def everything(folder: Path) -> tuple[dict, dict]:
    return outcomes_in_layouts(folder), outcomes_after_refit(folder)


@pytest.fixture(scope="module")
def found_on_ranks(gpt2_folder):
    """(layouts, refit) of each of two ranks; one start of processes for both tests."""
    return run_ranks(everything, 2, gpt2_folder)


def joined(ranks: list[Outcome], num_prompts: int = 10) -> Outcome:
    """One outcome of both ranks: a replica's ranks agree, replicas share the prompts."""
    both = ranks[0] | ranks[1]
    assert sorted(both) == list(range(num_prompts))
    for rank in ranks:
        assert_same(rank, {index: both[index] for index in rank})
    return both


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert actual.keys() == expected.keys()
    for index, (tokens, logprobs, has_eos) in expected.items():
        assert actual[index][0] == tokens, index
        assert np.allclose(actual[index][1], logprobs, rtol=0, atol=2e-5)
        assert actual[index][2] == has_eos


def test_every_layout_gives_the_same_responses(network, found_on_ranks):
    expected = {kind: outcome(network, config) for kind, config in CONFIGS.items()}
    assert len({tuple(tokens) for tokens, _, _ in expected["sampled"].values()}) > 5
    ranks = [in_layouts for in_layouts, _ in found_on_ranks]
    for name in LAYOUTS:
        for kind in CONFIGS:
            found = joined([rank[name][kind] for rank in ranks])
            assert_same(found, expected[kind])
        assert_same(joined([rank[name]["recorded"] for rank in ranks]), expected["sampled"])


def test_greedy_equals_huggingface_in_a_tensor_and_a_pipeline_layout(
    huggingface_greedy, found_on_ranks
):
    for in_layouts, _ in found_on_ranks:
        for name in ("tp2", "pp2"):
            assert in_layouts[name]["greedy"] == huggingface_greedy


def test_refit_fills_another_layout_and_stale_copies_are_refused(network, found_on_ranks):
    expected = outcome(network, SAMPLED)
    ranks = [after_refit for _, after_refit in found_on_ranks]
    for name in ("tp2", "dp2", "source"):
        assert_same(joined([rank[name] for rank in ranks]), expected)
        if name != "source":
            assert all(rank[f"{name}_bytes"] > 0 for rank in ranks)
    halved = joined([rank["halved_dp2"] for rank in ranks])
    assert_same(halved, joined([rank["halved_source"] for rank in ranks]))
    assert_same(joined([rank["filled_dp2"] for rank in ranks]), halved)
    assert any(halved[index][0] != expected[index][0] for index in expected)
