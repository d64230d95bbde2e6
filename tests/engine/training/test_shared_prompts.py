"""A comparison whose prompt is computed once has the scores, the loss and every gradient of
separate sequences, in every form and layout."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoints.weights import load_weights
from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.feed import pack_for
from engine.losses import comparison_loss, last_readings
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.passes import finish_gradients, forward, forward_backward
from engine.training.trainable import make_trainable
from models import prefixes
from models.packed_sequences import PackedSequences
from models.sizes import GPTSize
from models.trunk import run_trunk
from tests.forms import FORMS
from tests.ranks import run_ranks
from tests.tiny import (
    SIZE,
    random_network,
    rm_config,
    rows_of,
    train,
    weights_of,
    write_checkpoints,
    write_files,
)

# Tokens of a prompt, and of its completions: K from 2 to 9, a prompt of one token, completions that
# are the end of text and nothing else, and ones that are long beside their prompt.
SHAPES = [
    (5, (3, 4)),
    (1, (1, 1, 7)),
    (12, (30, 1, 20, 2)),
    (3, (2,) * 5),
    (9, (1,) * 6),
    (2, (40, 3, 17, 5, 8, 1, 50)),
    (20, (4, 6, 2, 3, 9, 1, 5, 7)),
    (7, (3, 2, 3, 9, 1, 4, 5, 2, 6)),
]
LAYOUTS = {
    "tp2": ParallelLayout(tp=2),
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "pp2": ParallelLayout(pp=2),
    "pp2_virtual": ParallelLayout(pp=2, virtual_pp=2),
    "dp2": ParallelLayout(),
    "cp2": ParallelLayout(cp=2),
}
NEAR = 1e-5
BUDGETS = (1, 100, 100_000)  # tokens of a micro-batch: one comparison, a few, all


def comparisons() -> list[list[Example]]:
    """Units of these shapes; every other one has ties."""
    draw = np.random.default_rng(0)

    def unit(number: int, prompt_length: int, rests: tuple[int, ...]) -> list[Example]:
        prompt = draw.integers(0, 100, prompt_length)
        ranks = draw.permutation(len(rests)) // (1 + number % 2)
        return [
            Example(
                tokens=np.concatenate([prompt, draw.integers(0, 100, rest)]),
                prompt_length=prompt_length,
                fields={"ranks": int(rank)},
            )
            for rest, rank in zip(rests, ranks, strict=True)
        ]

    return [unit(number, *shape) for number, shape in enumerate(SHAPES)]


def scores_of(network: Network, batches: list[PackedBatch]) -> dict[int, float]:
    """Return this rank's scores by the number of their sequence."""
    found: dict[int, float] = {}
    for batch, readings in zip(batches, forward(network, batches), strict=True):
        scores = last_readings(readings, batch.cu_seqlens).tolist()
        found |= dict(zip(batch.sequence_ids.tolist(), scores, strict=True))
    found.pop(-1, None)
    return found


def learned(network: Network, batches: list[PackedBatch]) -> tuple[float | None, list[Tensor]]:
    """Return the loss, on the last stage, and the gradients of this rank's parameters."""
    for chunk in network.chunks:
        chunk.zero_grad_buffer()
    found = forward_backward(network, batches, comparison_loss(len(SHAPES)))
    gradients = [p.main_grad for m in network.modules for p in m.parameters()]
    if dist.get_world_size() == network.parallel.dp * network.parallel.layout.cp:
        for gradient in gradients:  # summed whole: of the optimizer's sum a rank has its part
            dist.all_reduce(gradient)
    else:
        finish_gradients(network)
    return found["loss"].item() if found else None, [each.clone() for each in gradients]


def assert_alike(network: Network, budget: int) -> None:
    """Compare both ways to lay the comparisons out; a gradient relative to the largest."""
    alone, shared = (
        pack_for(comparisons(), network.parallel, budget, share_prompts=share_prompts)
        for share_prompts in (False, True)
    )
    assert sum(len(b.tokens) for b in shared) < 0.75 * sum(len(b.tokens) for b in alone)
    expected, found = scores_of(network, alone), scores_of(network, shared)
    if network.parallel.dp == 1:  # else the ranks are dealt others
        assert found == {n: pytest.approx(score, abs=NEAR) for n, score in expected.items()}
    (loss, gradients), (shared_loss, shared_gradients) = (
        learned(network, batches) for batches in (alone, shared)
    )
    largest = max(gradient.abs().max().item() for gradient in gradients)
    assert largest > 1e-3
    for ours, theirs in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=NEAR * max(largest, 1.0))
    if loss is not None and network.parallel.dp == 1:
        assert shared_loss == pytest.approx(loss, abs=NEAR)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=0)


@pytest.mark.parametrize("call", [-(10**9), 10**9], ids=["one by one", "a group at once"])
@pytest.mark.parametrize("form", ["gpt3", *FORMS])
def test_every_form_learns_the_same(form: str, call: int, parallel: Parallel, monkeypatch):
    monkeypatch.setattr(prefixes, "_CALL", call)
    network = random_network("scalar", parallel, size={"gpt3": SIZE, **FORMS}[form])
    make_trainable(network)
    for budget in BUDGETS:
        assert_alike(network, budget)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_the_same(recompute: str, parallel: Parallel):
    numerics = Numerics(recompute=recompute)  # type: ignore[arg-type]
    network = build_network("scalar", FORMS["llama"], parallel, numerics=numerics)
    make_trainable(network)
    assert_alike(network, 100)


def in_fp64(
    size: GPTSize, batch: PackedBatch, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[Tensor]]:
    """Return the scores in fp64, and the gradients of some weighted sum of them."""
    module = random_network("scalar", parallel, size=size).modules[0].double().requires_grad_()
    monkeypatch.setattr(module.config, "params_dtype", torch.float64)  # of the rotations
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen, None, batch.prefixes)
    hidden = run_trunk(module, batch.tokens, batch.positions, sequences)[:, 0]
    head = module.scalar_head
    scores = last_readings((hidden @ head.weight.T + head.bias)[:, 0], batch.cu_seqlens)
    weights = torch.linspace(-1, 1, len(scores), dtype=torch.float64)
    return scores, list(torch.autograd.grad((scores * weights).sum(), list(module.parameters())))


@pytest.mark.parametrize("call", [-(10**9), 10**9], ids=["one by one", "a group at once"])
@pytest.mark.parametrize("form", ["gpt3", "llama", "neox", "banded", "opt-350m"])
def test_in_fp64_nothing_but_its_rounding_is_left(
    form: str, call: int, parallel: Parallel, monkeypatch
):
    monkeypatch.setattr(prefixes, "_CALL", call)
    size = {"gpt3": SIZE, **FORMS}[form]
    (alone, gradients), (shared, shared_gradients) = (
        in_fp64(size, pack(comparisons(), multiple_of=1, share_prompts=each), parallel, monkeypatch)
        for each in (False, True)
    )
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-12)
    for ours, theirs in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def compare_on_a_rank(files: dict[str, Path]) -> None:
    """Compare in every layout of two ranks, each network from its files."""
    for layout in LAYOUTS.values():
        parallel = start_parallel(layout, seed=0)
        for name, folder in files.items():
            size = {"gpt3": SIZE, **FORMS}[name]
            network = build_network("scalar", size, parallel, numerics=Numerics())
            load_weights(network, folder / "reward_model", role="reward_model")
            make_trainable(network)
            for budget in BUDGETS[1:]:
                assert_alike(network, budget)


def test_two_ranks_learn_the_same_in_every_layout(tiny: Path, tmp_path: Path):
    write_files(tmp_path)
    write_checkpoints(tmp_path, FORMS["llama"])
    run_ranks(compare_on_a_rank, 2, {"gpt3": tiny, "llama": tmp_path})


def test_a_run_learns_what_one_with_separate_sequences_does(tiny: Path, tmp_path: Path):
    for name, share_prompts in (("shared", True), ("alone", False)):
        train(rm_config(tiny, tmp_path / name, epochs=4.0, share_prompts=share_prompts))
    shared, alone = (rows_of(tmp_path / name) for name in ("shared", "alone"))
    assert len(shared) == len(alone) > 10
    for row, other in zip(shared, alone, strict=True):
        assert row["train/tokens"] < 0.9 * other["train/tokens"]
        for key in ("train/loss", "train/pair_accuracy", "train/score_mean", "train/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    assert shared[-1]["valid/loss"] == pytest.approx(alone[-1]["valid/loss"], rel=1e-3)
    start = weights_of(tiny / "policy", "policy", "scalar")
    ours, theirs = (weights_of(tmp_path / name, "reward_model") for name in ("shared", "alone"))
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(theirs[name] - ours[name]).flatten() for name in start])
    assert apart.norm() < 1e-3 * moved.norm()
    assert dataclasses.asdict(rm_config(tiny, tmp_path))["share_prompts"]
