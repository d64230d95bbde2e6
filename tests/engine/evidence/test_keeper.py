"""Skipped steps are said once a row and kept, a few of them; nothing half is left behind."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from engine.data.examples import Example
from engine.data.unit_file import read_units
from engine.evidence.case import read_case
from engine.evidence.keeper import Evidence
from engine.metrics import Metrics
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from tests.engine.test_planted_numbers import spoil_scores
from tests.engine.training.test_skipped import spoil
from tests.tiny import ADAM, EVERY_STEP, Killed, ppo_config, sft_config, train, weights_of


def alarms_of(run: Path) -> list[dict]:
    """Return what was said of the run's steps; that its data are few is said before them."""
    path = run / "alarms.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [alarm for alarm in map(json.loads, lines) if alarm["name"] != "small_data"]


def kept_in(run: Path) -> list[str]:
    folder = run / "skipped"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_first_step_of_a_row_is_said_and_kept_with_the_weights_that_it_left(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, "language", [0, 1])
    train(sft_config(tiny, tmp_path))
    (alarm,) = (a for a in alarms_of(tmp_path) if a["name"] == "skipped_step")
    assert alarm["step"] == 0 and "step 0 of the policy was skipped" in alarm["message"]
    assert str(tmp_path / "skipped" / "step_00000000_policy") in alarm["message"]
    assert kept_in(tmp_path) == ["step_00000000_policy"]
    kept, began = (
        weights_of(tmp_path / "skipped" / "step_00000000_policy", "policy"),
        weights_of(tiny / "policy", "policy"),
    )
    assert all(torch.equal(kept[name], began[name]) for name in began)
    files = {path.name for path in (tmp_path / "skipped" / "step_00000000_policy").iterdir()}
    assert files == {"batch.safetensors", "case.json", "config.json", "manifest.json", "policy"}


def test_settings_are_kept_though_the_runs_file_of_them_is_gone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted: list[str] = []
    look = Evidence.look

    def removing(self: Evidence, *args: object, **kwargs: object) -> None:
        if not wanted:
            wanted.append((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").unlink()
        look(self, *args, **kwargs)

    spoil(monkeypatch, "language", [0])
    monkeypatch.setattr(Evidence, "look", removing)
    train(sft_config(tiny, tmp_path))
    kept = tmp_path / "skipped" / "step_00000000_policy" / "config.json"
    assert [kept.read_text()] == wanted


def test_first_iteration_of_a_row_is_kept_with_its_rollout_policy_and_critic(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil_scores(monkeypatch, "raw_scores", [1, 2], math.nan)
    train(ppo_config(tiny, tmp_path, iterations=3, saving=EVERY_STEP, ptx_coef=0.0))
    first, second = (a for a in alarms_of(tmp_path) if a["name"] == "skipped_rollout")
    assert kept_in(tmp_path) == ["step_00000002_rollout"]  # iterations have two steps each
    kept = tmp_path / "skipped" / "step_00000002_rollout"
    assert first["step"] == 1 and f"replay.py --step {kept}" in first["message"]
    assert second["step"] == 2 and "replay.py" not in second["message"]
    names = ("batch.safetensors", "case.json", "config.json", "critic", "manifest.json", "policy")
    assert sorted(path.name for path in kept.iterdir()) == sorted(names)
    for role in ("policy", "critic"):  # no step was taken since
        ended, found = weights_of(tmp_path, role), weights_of(kept, role)
        assert all(torch.equal(found[name], ended[name]) for name in ended), role
    case, episodes = read_case(kept), read_units(kept / "batch.safetensors")["episodes"]
    assert case.numbers.keys() == {"kl_coef"} and "reward model's scores" in case.reason
    scores = [episode.fields["raw_score"] for episode in episodes if isinstance(episode, Example)]
    assert [math.isnan(score) for score in scores] == [n == 3 for n in range(8)]


def test_last_few_rows_are_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, "language", [0, 2, 4])
    saving = SaveConfig(keep_skipped=2)
    train(sft_config(tiny, tmp_path, epochs=1.4, saving=saving))
    assert kept_in(tmp_path) == ["step_00000002_policy", "step_00000004_policy"]
    assert len([a for a in alarms_of(tmp_path) if a["name"] == "skipped_step"]) == 3


def test_none_is_kept_where_none_is_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, "language", [0])
    train(sft_config(tiny, tmp_path, saving=SaveConfig(keep_skipped=0)))
    assert kept_in(tmp_path) == [] and "Nothing of it is kept" in alarms_of(tmp_path)[0]["message"]


def test_search_for_fp16s_loss_scale_is_said_once_and_never_kept(tiny: Path, tmp_path: Path):
    data = dataclasses.replace(sft_config(tiny, tmp_path).data, pretraining_fraction=0.0)
    config = sft_config(tiny, tmp_path, epochs=2.0, numerics=Numerics(dtype="fp16"), data=data)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, "language", [1, 2, 3], math.inf)
        train(config)
    said = [a for a in alarms_of(tmp_path) if a["name"] == "loss_scale_search"]
    assert len(said) == 1 and "is said once" in said[0]["message"]
    assert kept_in(tmp_path) == []
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/scale_search_steps"] >= 3
    scales = [row["train/loss_scale"] for row in rows]
    assert scales[0] == 2.0**16 > scales[-1]


def test_a_full_disk_costs_the_evidence_and_not_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, "language", [0])
    enter = Metrics.__enter__

    def enter_and_block(metrics: Metrics) -> Metrics:
        (tmp_path / "skipped").write_text("a file where the folder would be")
        return enter(metrics)

    monkeypatch.setattr(Metrics, "__enter__", enter_and_block)  # the start looks for one
    train(sft_config(tiny, tmp_path))
    assert "It could not be kept: " in alarms_of(tmp_path)[0]["message"]
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_what_a_killed_run_left_half_is_cleared(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill(*_: object) -> str:
        raise Killed

    config = sft_config(tiny, tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, "language", [0])
        patch.setattr("engine.checkpoints.saving._complete", kill)
        patch.setattr("engine.checkpoints.saving.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            train(config)
    assert kept_in(tmp_path) == ["step_00000000_policy.partial"]
    train(config)
    assert kept_in(tmp_path) == []


def test_evidence_is_silent_of_a_sound_run(tiny: Path, tmp_path: Path):
    train(sft_config(tiny, tmp_path, adam=dataclasses.replace(ADAM, max_skipped_steps=1)))
    assert alarms_of(tmp_path) == [] and kept_in(tmp_path) == []
