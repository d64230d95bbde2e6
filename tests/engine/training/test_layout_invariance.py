"""Layout, packing and micro-batch size change nothing but rounding, in every stage; nor does what
is chosen on a GPU in another way than on a CPU.

One checkpoint is written by one rank and loaded under each layout. The weights that each run ends
with are loaded on one rank again, so that saving and loading across layouts is part of the claim.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.environment import rank_of_environment
from engine.metrics import read_metrics
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.residency import ResidencyConfig
from tests.gpu_choices import choices_of_a_gpu
from tests.ranks import run_ranks
from tests.tiny import EVERY_STEP, ppo_config, rm_config, rows_of, sft_config, train, weights_of

SELECTIVE, FULL = Numerics(recompute="selective"), Numerics(recompute="full")
FUSED = Numerics(gradient_accumulation_fusion=True)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
DP = ParallelLayout(bucket_elements=5_000)  # several buckets, where there is anything to overlap
PP2, TP2, CP2 = replace(DP, pp=2), replace(DP, tp=2), replace(DP, cp=2)
TP2_SEQUENCE = replace(TP2, sequence_parallel=True)
PP2_VIRTUAL = replace(PP2, virtual_pp=2)
TP2_PP2 = replace(TP2_SEQUENCE, pp=2)
# What each run's config has that the one of a single rank has not.
ONE: dict[str, dict] = {"one": {}}
TWO = {
    "tp2_sequence_selective": {"layout": TP2_SEQUENCE, "numerics": SELECTIVE},
    "tp2": {"layout": TP2},
    "pp2": {"layout": PP2},
    "pp2_virtual_full": {"layout": PP2_VIRTUAL, "numerics": FULL},
    "dp2": {"layout": DP},
    "cp2": {"layout": CP2},
}
FOUR = {
    "tp2_pp2_sequence": {"layout": TP2_PP2},
    "tp2_dp2_fused": {"layout": TP2, "numerics": FUSED},
    "pp2_dp2": {"layout": PP2},
    "cp2_tp2_sequence": {"layout": replace(TP2_SEQUENCE, cp=2)},
    "cp2_pp2_virtual_full": {
        "layout": replace(PP2_VIRTUAL, cp=2),
        "numerics": FULL,
    },
    "cp2_dp2_overlap_selective": {
        "layout": replace(CP2, **OVERLAP),
        "numerics": SELECTIVE,
    },
    "pp2_dp2_virtual_overlap": {"layout": replace(PP2_VIRTUAL, **OVERLAP)},
}
# PPO alone: policy, critic and generation in layouts of their own on the same ranks.
PPO_TWO = {
    "tp2_critic_pp2": {"layout": TP2_SEQUENCE, "critic_layout": PP2},
    "pp2_critic_dp2": {"layout": PP2, "critic_layout": DP},
    "dp2_overlap_fused": {"layout": replace(DP, **OVERLAP), "numerics": FUSED},
    "pp2_generates_in_dp2": {"layout": PP2, "generation_layout": DP},
    "pp2_overlap_generates_in_tp2": {
        "layout": replace(PP2, **OVERLAP),
        "generation_layout": TP2_SEQUENCE,
    },
}
PPO_FOUR = {
    "cp4_critic_dp4": {"layout": replace(DP, cp=4), "critic_layout": DP},
    "tp2_pp2_critic_dp4": {"layout": TP2_PP2, "critic_layout": DP},
    "pp2_dp2_virtual_overlap_critic_tp2_dp2": {
        "layout": replace(PP2_VIRTUAL, **OVERLAP),
        "critic_layout": replace(TP2_SEQUENCE, **OVERLAP),
    },
    "tp2_pp2_generates_in_tp4": {"layout": TP2_PP2, "generation_layout": replace(DP, tp=4)},
    "tp2_pp2_critic_dp4_generates_in_dp4": {
        "layout": TP2_PP2,
        "critic_layout": DP,
        "generation_layout": DP,
        "residency": ResidencyConfig(reference="host", critic="host", optimizer="host"),
    },
    "pp2_dp2_virtual_overlap_generates_in_tp2_dp2": {
        "layout": replace(PP2_VIRTUAL, **OVERLAP),
        "generation_layout": TP2,
    },
}
# These are started again from their first checkpoint besides.
RESUMED = ("tp2_critic_pp2", "pp2_overlap_generates_in_tp2")
# What only a run that generates in a layout of its own records.
REFIT = "rollout/refit_bytes"
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


def train_stages(files: Path, folder: Path, cases: dict[str, dict], ppo: dict[str, dict]) -> None:
    """Run every stage in every way, and PPO in some more: folder/CASE/STAGE."""
    for name, changes in cases.items():
        for stage, (config, _) in STAGES.items():
            train(config(files, folder / name / stage, **changes))
    for name, changes in ppo.items():
        config = ppo_config(files, folder / name / "ppo", saving=EVERY_STEP, **changes)
        train(config)
        if name in RESUMED:
            resumed = replace(config, directory=folder / name / "resumed")
            if rank_of_environment() == 0:
                copy_without_last_checkpoint(config.directory, resumed.directory)
            dist.barrier()
            train(resumed)


def train_stages_as_on_gpus(*args: Any) -> None:
    """Do the same with the choices of a GPU."""
    with choices_of_a_gpu():
        train_stages(*args)


def copy_without_last_checkpoint(run: Path, copy: Path) -> None:
    """Copy a finished run of two iterations as if it had died before it saved the second."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000002")
    (copy / "checkpoints" / "latest").write_text("step_00000001")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(tiny: Path, runs: Path) -> Path:
    """The runs that all others are compared with."""
    train_stages(tiny, runs, ONE, {})
    return runs / "one"


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, runs: Path) -> Path:
    # One world for all: starting it takes longest.
    run_ranks(train_stages, 2, tiny, runs, TWO, PPO_TWO)
    return runs


@pytest.fixture(scope="module")
def four_ranks(tiny: Path, runs: Path) -> Path:
    run_ranks(train_stages, 4, tiny, runs, FOUR, PPO_FOUR)
    return runs


@pytest.fixture(scope="module")
def as_on_gpus(tiny: Path, runs: Path) -> Path:
    """All runs again, with the choices of a GPU."""
    folder = runs / "as_on_gpus"
    train_stages_as_on_gpus(tiny, folder, ONE, {})
    run_ranks(train_stages_as_on_gpus, 2, tiny, folder, TWO, PPO_TWO)
    run_ranks(train_stages_as_on_gpus, 4, tiny, folder, FOUR, PPO_FOUR)
    return folder


def assert_same_training(files: Path, stage: str, run: Path, other: Path) -> None:
    """Compare the rows of metrics and the updates of the weights of two runs."""
    rows, other_rows = rows_of(run), rows_of(other)
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.keys() - {REFIT} == other_row.keys()
        for key in other_row:
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


@pytest.mark.parametrize("case", PPO_TWO)
def test_policy_and_critic_in_two_layouts_train_as_one(
    case: str, tiny: Path, one_rank: Path, two_ranks: Path
):
    assert_same_training(tiny, "ppo", two_ranks / case / "ppo", one_rank / "ppo")


@pytest.mark.parametrize("case", RESUMED)
def test_run_of_two_layouts_continues_bit_for_bit(case: str, two_ranks: Path):
    whole, resumed = (two_ranks / case / name for name in ("ppo", "resumed"))
    assert (resumed / "checkpoints" / "latest").read_text() == "step_00000002"
    assert rows_of(resumed) == rows_of(whole)
    for role in STAGES["ppo"][1]:
        ours, theirs = weights_of(resumed, role), weights_of(whole, role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), role


def test_runs_remember_their_layouts(two_ranks: Path):
    config = json.loads((two_ranks / "tp2_critic_pp2" / "ppo" / "config.json").read_text())
    assert (config["layout"]["tp"], config["critic_layout"]["pp"]) == (2, 2)


@pytest.mark.parametrize("case", [case for case in PPO_TWO if "generates" in case])
def test_refits_are_measured_and_their_copy_has_memory_in_rollouts_only(case: str, two_ranks: Path):
    run = two_ranks / case / "ppo"
    for row in read_metrics(run):
        # Half of the weights are the other stage's; the rest is moved within the rank.
        copied = row["memory/rollout_generation_bytes"]
        assert 0.3 * copied < row[REFIT] < 0.7 * copied
        assert 0 < row["rollout/refit_seconds"] < row["rollout/seconds"]
        assert row["memory/score_generation_bytes"] == row["memory/update_generation_bytes"] == 0
        assert row["memory/rollout_policy_bytes"] > 0
    lines = (run / "memory.txt").read_text().splitlines()
    most, expected = (
        float(next(line for line in lines if line.startswith(start)).split()[column])
        for start, column in (("most at once", 3), ("expected", -4))
    )
    assert most == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", PPO_FOUR)
def test_four_ranks_in_two_layouts_train_as_one(
    case: str, tiny: Path, one_rank: Path, four_ranks: Path
):
    assert_same_training(tiny, "ppo", four_ranks / case / "ppo", one_rank / "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_train_as_one(
    layout: str, stage: str, tiny: Path, one_rank: Path, four_ranks: Path
):
    assert_same_training(tiny, stage, four_ranks / layout / stage, one_rank / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", [*ONE, *TWO, *FOUR])
def test_ranks_that_choose_as_gpus_train_as_one_that_does_not(
    layout: str, stage: str, tiny: Path, one_rank: Path, as_on_gpus: Path
):
    assert_same_training(tiny, stage, as_on_gpus / layout / stage, one_rank / stage)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PPO_TWO, *PPO_FOUR])
def test_two_layouts_of_ranks_that_choose_as_gpus_train_as_one_that_does_not(
    case: str, tiny: Path, one_rank: Path, as_on_gpus: Path
):
    assert_same_training(tiny, "ppo", as_on_gpus / case / "ppo", one_rank / "ppo")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("budget", [1, 100_000], ids=["one_by_one", "all_at_once"])
def test_micro_batch_size_changes_nothing(
    budget: int, stage: str, tiny: Path, one_rank: Path, tmp_path: Path
):
    config, _ = STAGES[stage]
    changed = replace(config(tiny, tmp_path), micro_batch_tokens=budget)
    train(changed)
    assert_same_training(tiny, stage, tmp_path, one_rank / stage)
