"""Spikes are left out or passed over, and a run that was killed ends as one that was not."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.course import Course
from engine.errors import UserError
from engine.metrics import Metrics
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.stop import EXIT_STATUS
from tests.engine.planted_spikes import SPIKES, STAGES, alarms_of, plant, spiky_config
from tests.engine.test_resume import assert_same_run
from tests.ranks import run_ranks
from tests.tiny import rows_of, train, train_until, weights_of

SKIP = dataclasses.replace(SPIKES, policy="skip")
LAST = 5  # the step or iteration of the planted spikes; checkpoints 2 and 4 are before it

# PPO takes a quarter of a minute.
SLOWLY = ["sft", "rm", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ppo", "ppo_critic"))]


def positions_of(stage: str, *steps: int) -> list[int]:
    """Return the positions at which the first optimizer step of each of these steps is."""
    return [step * STAGES[stage][-1] for step in steps]


@pytest.mark.parametrize("stage", SLOWLY)
def test_sound_run_is_the_same_whatever_the_policy(stage: str, tiny: Path, tmp_path: Path):
    for policy in ("none", "skip", "rewind"):
        spikes = dataclasses.replace(SPIKES, policy=policy, loss_factor=20.0)
        train(spiky_config(stage, tiny, tmp_path / policy, spikes=spikes))
        assert alarms_of(tmp_path / policy) == []
    for role in STAGES[stage][3]:
        ours, *others = (weights_of(tmp_path / p, role) for p in ("none", "skip", "rewind"))
        for other in others:
            assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("stage", STAGES)
def test_spike_is_left_out_counted_and_said_once(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    *_, kind, _, metric, num_updates = STAGES[stage]
    results = plant(monkeypatch, kind, positions_of(stage, LAST, 7))
    train(spiky_config(stage, tiny, tmp_path, spikes=SKIP))
    left_out = [number for number, result in enumerate(results) if result.was_skipped]
    assert left_out == positions_of(stage, LAST, 7)
    assert len(results) == 8 * num_updates
    assert [row[metric] for row in rows_of(tmp_path)] == [0, 0, 0, 0, 0, 1, 1, 2]
    (said,) = alarms_of(tmp_path)
    assert said["step"] == LAST and said["name"] == "spike"
    for words in ("gradient norm of the", "after a median of", "left out", "spiked_steps"):
        assert words in said["message"]


@pytest.mark.parametrize("stage", STAGES)
def test_rewind_goes_on_from_the_newest_checkpoint_behind_the_spikes_data(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, kind, roles, metric, num_updates = STAGES[stage]
    spikes = dataclasses.replace(SPIKES, extra_batches=1)
    with monkeypatch.context() as patch:
        results = plant(patch, kind, positions_of(stage, LAST))
        train(spiky_config(stage, tiny, tmp_path / "spiked", spikes=spikes))
    # Steps 0 to 4, the first update of step 5, and 4 to 7.
    assert len(results) == LAST * num_updates + 1 + 4 * num_updates
    (said,) = alarms_of(tmp_path / "spiked")
    assert said["step"] == 4 and said["name"] == "rewind"
    assert "step 5:" in said["message"] and "passes over 3 batches" in said["message"]
    rows = rows_of(tmp_path / "spiked")
    lines = (tmp_path / "spiked/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(8)]
    assert {row[metric] for row in rows} == {0}

    # The same from the same checkpoint on, told to begin at position 7 = 5 + 1 + 1.
    config = spiky_config(stage, tiny, tmp_path / "told", spikes=spikes)
    train_until(config, 4)
    resume = Checkpointer.resume

    def told(self: Checkpointer) -> dict[str, Any] | None:
        return (resume(self) or {}) | {"passed_over": 3, "rewinds": 1}

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "resume", told)
        train(config)
    assert_same_run(tmp_path / "spiked", tmp_path / "told", roles)


@pytest.mark.parametrize("stage", SLOWLY[:3])
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_killed_anywhere_the_run_ends_as_undisturbed(
    stage: str, policy: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, kind, roles, *_ = STAGES[stage]
    spikes = dataclasses.replace(SPIKES, policy=policy, warmup=3)
    plant(monkeypatch, kind, positions_of(stage, LAST))
    train(spiky_config(stage, tiny, tmp_path / "whole", spikes=spikes))
    kills = {"at": [LAST], "behind": [6], "twice": [4, LAST, 7]}
    if policy == "rewind":
        kills["after"] = []  # of step 4, as it is taken anew
        config = spiky_config(stage, tiny, tmp_path / "after", spikes=spikes)
        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "set_back", die)
            with pytest.raises(RuntimeError, match="dies here"):
                train(config)
    for name, steps in kills.items():
        config = spiky_config(stage, tiny, tmp_path / name, spikes=spikes)
        for step in steps:
            train_until(config, step)
        train(config)
        assert_same_run(tmp_path / name, tmp_path / "whole", roles)
        assert [said["name"] for said in alarms_of(tmp_path / name)] == [
            "rewind" if policy == "rewind" else "spike"
        ]


def die(self: Metrics, step: int) -> None:
    raise RuntimeError("dies here")


def test_run_that_a_signal_stopped_before_the_spike_goes_back_as_far(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, "language", [LAST])
    saving = SaveConfig(save_every=3, keep=1)
    train(spiky_config("sft", tiny, tmp_path / "whole", saving=saving))
    log = Metrics.log

    def log_and_signal(self: Metrics, step: int, values: Mapping[str, float]) -> None:
        log(self, step, values)
        if step in (3, 4) and step not in signalled:
            signalled.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    signalled: list[int] = []
    config = spiky_config("sft", tiny, tmp_path / "stopped", saving=saving)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_signal)
        for _ in range(2):
            with pytest.raises(SystemExit) as left:
                train(config)
            assert left.value.code == EXIT_STATUS
    assert (tmp_path / "stopped/checkpoints/latest").read_text() == "step_00000005"
    train(config)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", ("policy",))
    assert [said["step"] for said in alarms_of(tmp_path / "stopped")] == [3]
    names = sorted(path.name for path in (tmp_path / "stopped/checkpoints").glob("step*"))
    assert names == ["step_00000006", "step_00000008"]  # the newest due, and the last


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_rewinds_are_bounded(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, STAGES[stage][2], range(STAGES[stage][-1] * LAST, 99))
    spikes = dataclasses.replace(SPIKES, max_rewinds=2)
    with pytest.raises(UserError) as error:
        train(spiky_config(stage, tiny, tmp_path, spikes=spikes))
    for words in ("set back 2 times", str(tmp_path / "checkpoints/step_00000004"), "max_rewinds"):
        assert words in str(error.value)
    assert [said["step"] for said in alarms_of(tmp_path)] == [4, 4]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000004"


def test_without_a_checkpoint_the_step_is_left_out_and_that_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = plant(monkeypatch, "scalar", [LAST])
    train(spiky_config("rm", tiny, tmp_path, saving=SaveConfig()))
    assert [number for number, result in enumerate(results) if result.was_skipped] == [LAST]
    (said,) = alarms_of(tmp_path)
    assert said["name"] == "spike" and "No checkpoint is there" in said["message"]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo_critic"])
def test_new_level_ends_the_run_and_keeps_the_last_good_checkpoint(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = plant(monkeypatch, STAGES[stage][2], range(4 * STAGES[stage][-1], 99))
    spikes = dataclasses.replace(SKIP, max_in_a_row=2)
    config = spiky_config(stage, tiny, tmp_path, spikes=spikes)
    with pytest.raises(UserError) as error:
        train(config)
    for words in (
        "a new level",
        str(tmp_path / "checkpoints/step_00000004"),
        "--spikes.norm-factor",
    ):
        assert words in str(error.value)
    assert sum(result.was_skipped for result in results) == 2
    taken = SpikeConfig(policy="none")
    train(dataclasses.replace(config, spikes=taken))  # the remedy that is named
    assert len(rows_of(tmp_path)) == 8


def test_checkpoints_of_before_a_row_of_spikes_stay(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, "language", range(4, 99))
    spikes = dataclasses.replace(SKIP, max_in_a_row=4)
    with pytest.raises(UserError, match="beside it: .*step_00000004, step_00000003"):
        train(spiky_config("sft", tiny, tmp_path, spikes=spikes, saving=SaveConfig(save_every=1)))


LAYOUTS = {
    "tp2_sequence": {"layout": ParallelLayout(tp=2, sequence_parallel=True)},
    "dp2_overlap": {
        "layout": ParallelLayout(
            overlap_grad_reduce=True, overlap_param_gather=True, bucket_elements=5_000
        )
    },
    "pp2_virtual": {"layout": ParallelLayout(pp=2, virtual_pp=2)},
}
APART = {"layout": ParallelLayout(pp=2), "critic_layout": ParallelLayout(tp=2)}


def train_planted(stage: str, files: Path, folder: Path, layouts: dict[str, dict]) -> None:
    for name, changes in layouts.items():
        spikes = dataclasses.replace(SPIKES, loss_factor=20.0)
        if stage == "sft":
            changes = {**changes, "dropout": 0.0}  # which is drawn anew in another layout
        config = spiky_config(stage, files, folder / name, spikes=spikes, **changes)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, STAGES[stage][2], positions_of(stage, LAST))
            train(config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "ppo_critic"])
def test_layouts_go_back_alike(stage: str, tiny: Path, tmp_path: Path):
    layouts = LAYOUTS | ({"apart": APART} if stage.startswith("ppo") else {})
    train_planted(stage, tiny, tmp_path, {"one": {}})
    run_ranks(train_planted, 2, stage, tiny, tmp_path, layouts)
    expected, norm = rows_of(tmp_path / "one"), "critic_" if stage == "ppo_critic" else ""
    key = f"update/{norm or 'policy_'}grad_norm" if stage.startswith("ppo") else "train/grad_norm"
    for name in layouts:
        (said,) = alarms_of(tmp_path / name)
        assert said["name"] == "rewind" and said["step"] == 4
        rows = rows_of(tmp_path / name)
        assert [row["step"] for row in rows] == [*range(8)]
        pairs = [(row[key], other[key]) for row, other in zip(rows, expected, strict=True)]
        assert all(math.isclose(ours, theirs, rel_tol=2e-3) for ours, theirs in pairs), pairs


class Remembered:
    """What a stage keeps, in the smallest form."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def state_dict(self) -> list[int]:
        return list(self.epochs)

    def load_state_dict(self, state: list[int]) -> None:
        self.epochs = list(state)


def test_course_goes_back_in_steps_and_on_in_the_data_with_what_the_stage_keeps():
    kept, progress = Remembered(), {"step": 3, "epochs": [1], "passed_over": 1}
    course = Course(Mock(), SPIKES, progress, 5, {"epochs": kept})
    walked = []
    for step in course:
        walked.append((step, course.position))
        kept.epochs.append(step)
        if len(walked) == 2:
            course._go_on_from({"step": 2, "epochs": [0], "passed_over": 0}, Mock(), "a spike")
    assert walked == [(3, 4), (4, 5), (2, 6), (3, 7), (4, 8)]
    assert course.state_dict() == {"epochs": [0, 2, 3, 4], "passed_over": 4, "rewinds": 1}
