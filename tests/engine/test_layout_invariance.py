"""Layout, packing and micro-batch size change nothing but rounding, in every stage.

One checkpoint is written by one rank and loaded under each layout. The weights that each run ends
with are loaded on one rank again, so that saving and loading across layouts is part of the claim.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.settings.layout import ParallelLayout
from tests.ranks import run_ranks
from tests.tiny import ppo_config, rm_config, rows_of, sft_config, train, weights_of

ONE = {"one": ParallelLayout()}
TWO = {
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "tp2": ParallelLayout(tp=2),
    "pp2": ParallelLayout(pp=2),
    "pp2_virtual": ParallelLayout(pp=2, virtual_pp=2),
    "dp2": ParallelLayout(),
}
FOUR = {
    "tp2_pp2_sequence": ParallelLayout(tp=2, pp=2, sequence_parallel=True),
    "pp2_dp2": ParallelLayout(pp=2),
}
# By stage: its config, and by role which network each starts from.
STAGES: dict[str, tuple[Callable, dict[str, tuple]]] = {
    "sft": (sft_config, {"policy": ("policy", "policy")}),
    "rm": (rm_config, {"reward_model": ("policy", "policy", "scalar")}),
    "ppo": (
        ppo_config,
        {
            "policy": ("policy", "policy"),
            "ema": ("policy", "policy"),
            "critic": ("reward_model", "reward_model"),
        },
    ),
}
LOSSES = 1e-5  # relative; the losses and gradient norms of a step
UPDATES = 1e-3  # relative, Frobenius; what the run has added to the weights


def train_stages(files: Path, folder: Path, layouts: dict[str, ParallelLayout]) -> None:
    """Run every stage under every layout: folder/LAYOUT/STAGE."""
    for name, layout in layouts.items():
        for stage, (config, _) in STAGES.items():
            train(config(files, folder / name / stage, layout=layout))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(tiny: Path, runs: Path) -> Path:
    """The runs that all others are compared with."""
    train_stages(tiny, runs, ONE)
    return runs / "one"


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, runs: Path) -> Path:
    run_ranks(train_stages, 2, tiny, runs, TWO)  # one world for all: starting it takes longest
    return runs


@pytest.fixture(scope="module")
def four_ranks(tiny: Path, runs: Path) -> Path:
    run_ranks(train_stages, 4, tiny, runs, FOUR)
    return runs


def assert_same_training(files: Path, stage: str, run: Path, other: Path) -> None:
    """Compare the rows of metrics and the updates of the weights of two runs."""
    rows, other_rows = rows_of(run), rows_of(other)
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.keys() == other_row.keys()
        for key in row:
            if key.endswith(("loss", "grad_norm", "accuracy", "reward_mean", "kl")):
                # Whitened advantages are of size 1 and cancel in the policy loss.
                smallest = 1e-6 if key == "update/policy_loss" else 0.0
                assert math.isclose(row[key], other_row[key], rel_tol=LOSSES, abs_tol=smallest), key
    for role, (name, *start_role) in STAGES[stage][1].items():
        start = weights_of(files / name, *start_role)
        ours, theirs = weights_of(run, role), weights_of(other, role)
        updates = torch.cat([(theirs[name] - start[name]).flatten() for name in start])
        differences = torch.cat([(ours[name] - theirs[name]).flatten() for name in start])
        assert updates.norm() > 0.01, "nothing was learnt"
        assert differences.norm() / updates.norm() < UPDATES, role


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_train_as_one(
    layout: str, stage: str, tiny: Path, one_rank: Path, two_ranks: Path
):
    assert_same_training(tiny, stage, two_ranks / layout / stage, one_rank / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_train_as_one(
    layout: str, stage: str, tiny: Path, one_rank: Path, four_ranks: Path
):
    assert_same_training(tiny, stage, four_ranks / layout / stage, one_rank / stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("budget", [1, 100_000], ids=["one_by_one", "all_at_once"])
def test_micro_batch_size_changes_nothing(
    budget: int, stage: str, tiny: Path, one_rank: Path, tmp_path: Path
):
    config, _ = STAGES[stage]
    changed = dataclasses.replace(config(tiny, tmp_path), micro_batch_tokens=budget)
    train(changed)
    assert_same_training(tiny, stage, tmp_path, one_rank / stage)
