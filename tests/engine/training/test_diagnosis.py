"""What was not finite in a step is named: losses, parameters, ranks."""

import math

import pytest
import torch

from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.training.diagnosis import Diagnosis, check_of, diagnose, losses_in
from engine.training.optimizer import Optimizer
from tests.engine.training.test_optimizer import masters, take_step
from tests.engine.training.test_skipped_ranks import spoiled
from tests.ranks import run_ranks
from tests.tiny import random_network

LAYOUTS = {"tp2": ParallelLayout(tp=2), "dp2": ParallelLayout(), "pp2": ParallelLayout(pp=2)}


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_a_step_whose_gradient_is(
    dtype: str, value: float, parallel: Parallel
):
    network = random_network("language", parallel, dtype=dtype)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=9)
    while take_step(optimizer, 0).was_skipped:  # fp16 finds its scale
        pass
    before = [master.clone() for master in masters(optimizer)]
    for name, other in (("ptx_loss", "clip_fraction"), ("score_sum", "score_square_sum")):
        metrics = {name: torch.tensor(1.0), other: torch.tensor(value)}
        network.chunks[0].zero_grad_buffer()
        assert not optimizer.step(1, metrics).was_skipped, other  # it says nothing of the gradient
        before = [master.clone() for master in masters(optimizer)]
        metrics = {"loss": torch.tensor(2.0), name: torch.tensor(value)}
        assert optimizer.step(1, metrics).was_skipped
        # No smaller loss scale mends it, so fp16 counts it too.
        assert optimizer.skipped.reason == f"{name} is {value:g}"
    assert optimizer.skipped.in_a_row == 1
    pairs = zip(before, masters(optimizer), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_losses_of_the_largest_finite_numbers_are_finite():
    metrics = {"loss": torch.tensor(3e38), "ptx_loss": torch.tensor([3e38, 3e38])}
    assert check_of(metrics, torch.zeros(1)).tolist() == [0.0]
    assert check_of({"kl": torch.tensor(math.nan)}, torch.zeros(1)).tolist() == [0.0]
    assert losses_in(metrics) == metrics


def test_search_for_the_loss_scale_is_counted_apart(parallel: Parallel):
    network = random_network("language", parallel, dtype="fp16")
    adam = AdamConfig(min_loss_scale=2.0**14, max_skipped_steps=2)
    optimizer = Optimizer(network, adam, total_steps=9)
    found = []
    while not optimizer.skipped.is_stuck:
        result = take_step(optimizer, 0, scale=1e30)
        found.append((result.loss_scale, optimizer.skipped.num_searching, optimizer.skipped.reason))
        assert len(found) < 9
    # megatron tolerates one overflow before it halves; at the floor each is held against the run.
    assert [scale for scale, _, _ in found] == [2.0**16, 2.0**16, 2.0**15, 2.0**14, 2.0**14]
    assert [number for _, number, _ in found] == [1, 2, 3, 3, 3]
    assert [bool(reason) for *_, reason in found] == [False, False, False, True, True]
    assert optimizer.numbers(result)["scale_search_steps"] == 3.0
    assert "loss_scale" not in Optimizer(
        random_network("language", parallel), adam, total_steps=9
    ).numbers(result)


def test_diagnosis_is_a_clause():
    gradients = {f"layer{n}": [0, 1] for n in range(5)}
    assert str(Diagnosis(losses={"loss": "nan"}, gradients=gradients)) == (
        "loss is nan; the gradient is not finite in layer0 (rank 0, 1), layer1 (rank 0, 1), "
        "layer2 (rank 0, 1) and 2 more"
    )
    assert "norm is not finite" in str(Diagnosis(losses={}, gradients={}))


def found_on(layout_name: str, rank: int) -> dict:
    """Spoil the last layer's norm in the backward pass on one rank; return what is said of it."""
    parallel = start_parallel(LAYOUTS[layout_name], seed=1)
    network = random_network("language", parallel)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=9)
    *_, last = network.modules[0].decoder.layers
    weight = last.mlp.linear_fc2.weight
    with spoiled(weight if parallel.rank == rank else None, is_reduced=False):
        result = take_step(optimizer, 0)
    assert result.was_skipped and optimizer.skipped.reason
    return diagnose(network, {}).gradients


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_and_rank_are_named(layout: str):
    for rank in (0, 1):
        first, second = run_ranks(found_on, 2, layout, rank)
        assert first == second
        layer = 1 if layout == "pp2" and rank == 0 else 3  # of the whole network, from 0
        (name,) = first
        assert name == f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        # A replica holds what it has reduced, too.
        assert rank in first[name] and (first[name] == [rank] or layout == "dp2")
