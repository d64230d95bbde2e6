"""Spikes are left out or passed over, and a run that was killed ends as one that was not."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.errors import UserError
from engine.metrics import Metrics
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.stop import EXIT_STATUS
from tests.engine.planted_spikes import SPIKES, STAGES, alarms_of, plant, spiky_config
from tests.engine.test_resume import assert_same_run
from tests.tiny import rows_of, train, train_until, weights_of

SKIP = dataclasses.replace(SPIKES, policy="skip")
LAST = 5  # the step or iteration of the planted spikes; checkpoints 2 and 4 are before it


def positions_of(stage: str, *steps: int) -> list[int]:
    """Return the positions at which the first optimizer step of each of these steps is."""
    return [step * STAGES[stage][-1] for step in steps]


@pytest.mark.parametrize("stage", STAGES)
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
    _, _, kind, roles, metric, _ = STAGES[stage]
    spikes = dataclasses.replace(SPIKES, extra_batches=1)
    with monkeypatch.context() as patch:
        plant(patch, kind, positions_of(stage, LAST))
        train(spiky_config(stage, tiny, tmp_path / "spiked", spikes=spikes))
    (said,) = alarms_of(tmp_path / "spiked")
    assert said["step"] == 4 and said["name"] == "rewind"
    assert "step 5:" in said["message"] and "passes over 3 batches" in said["message"]
    rows = rows_of(tmp_path / "spiked")
    assert [row["step"] for row in rows] == [*range(8)]
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


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
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
    for words in ("a new level", str(tmp_path / "checkpoints/step_00000004"), "norm_factor"):
        assert words in str(error.value)
    assert sum(result.was_skipped for result in results) == 2
    taken = SpikeConfig(policy="none")
    train(dataclasses.replace(config, spikes=taken))  # the remedy that is named
    assert len(rows_of(tmp_path)) == 8
