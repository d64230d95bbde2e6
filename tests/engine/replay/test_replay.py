"""A step that was skipped is rerun from what was kept, and the planted place is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.replay.replay import replay
from engine.settings.layout import ParallelLayout
from engine.settings.replay import ReplayConfig
from engine.training.diagnosis import diagnose, losses_in
from models.sizes import Kind
from tests.engine.replay.planted import HUGE, PLACE, ended, plant, stuck_run
from tests.engine.training.test_skipped import spoil
from tests.ranks import run_ranks
from tests.tiny import ppo_config, sft_config, train

LAYOUTS = {"tp2": ParallelLayout(tp=2), "dp2": ParallelLayout(), "pp2": ParallelLayout(pp=2)}


def report(capsys: pytest.CaptureFixture, folder: Path) -> str:
    capsys.readouterr()
    replay(ReplayConfig(step=folder))
    return capsys.readouterr().out


def kept_of(folder: Path) -> Path:
    (kept,) = (folder / "run" / "skipped").iterdir()
    return kept


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_replay_names_the_planted_place(
    stage: str, dtype: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    said = stuck_run(stage, tiny, tmp_path, dtype)
    assert "loss is nan" in said and "2 optimizer steps in a row" in said
    lines = report(capsys, kept_of(tmp_path)).splitlines()
    assert lines[1].startswith("weights: finite") and lines[1].endswith(f"{PLACE}.weight")
    assert lines[3].startswith(f"forward, first not finite on rank 0: {PLACE} (ColumnParallel")
    # The first operation backwards is that of the loss, which the line of the library names.
    assert "backward, first not finite on rank 0: " in lines[4] and "kernels/" in lines[4]
    assert lines[5].startswith("whole step: ") and "loss is nan" in lines[5]
    assert lines[-1] == "reproduced"


def test_a_gradient_that_was_spoiled_from_outside_is_not_reproduced(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        spoil(patch, "language", [1])
        train(sft_config(tiny, tmp_path / "run"))
    with pytest.raises(SystemExit) as leaving:
        report(capsys, kept_of(tmp_path))
    assert leaving.value.code == 1
    out = capsys.readouterr().out.splitlines()
    assert "step 1 of the policy (sft) was skipped: the gradient is not finite in" in out[0]
    assert out[-1].startswith("NOT reproduced")
    assert [line.rpartition(": ")[2] for line in out[3:-1]] == ["finite"] * 5


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_steps_of_ppo_are_rerun_with_what_their_tokens_carried(
    role: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    kind: Kind = "language" if role == "policy" else "scalar"
    losses: list[float] = []
    with monkeypatch.context() as patch:
        spoil(patch, kind, [2])
        patch.setattr("engine.training.optimizer.diagnose", noting(losses))
        train(ppo_config(tiny, tmp_path / "run"))
    patch_of_replay = noting(losses)
    monkeypatch.setattr("engine.replay.replay.diagnose", patch_of_replay)
    with pytest.raises(SystemExit):
        report(capsys, kept_of(tmp_path))
    assert kept_of(tmp_path).name == f"step_00000002_{role}"
    assert losses[1] == losses[0] != 0.0  # to the last bit


def test_dropout_of_a_step_is_drawn_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    losses: list[float] = []
    with monkeypatch.context() as patch:
        spoil(patch, "language", [1])
        patch.setattr("engine.training.optimizer.diagnose", noting(losses))
        train(sft_config(tiny, tmp_path / "run", dropout=0.2))
    monkeypatch.setattr("engine.replay.replay.diagnose", noting(losses))
    with pytest.raises(SystemExit):
        report(capsys, kept_of(tmp_path))
    assert losses[1] == losses[0]  # to the last bit


def noting(losses: list[float]):
    """Return a diagnosis that notes the loss it is of."""

    def noted(network, metrics):
        losses.append(sum(float(value) for value in losses_in(metrics).values()))
        return diagnose(network, metrics)

    return noted


def hostile(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    path = folder / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_folders_that_hold_no_step_are_an_error_in_words(tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--step is required"):
        replay(ReplayConfig())
    with pytest.raises(UserError, match="no such file"):
        replay(ReplayConfig(step=tmp_path))
    stuck_run("rm", tiny, tmp_path)
    kept = kept_of(tmp_path)
    hostile(kept, "case.json", lambda case: case.update(step=3))
    with pytest.raises(UserError, match="case.json: damaged"):
        replay(ReplayConfig(step=kept))
    hostile(kept, "case.json", lambda case: case.update(role="judge"))
    with pytest.raises(UserError, match="'role' cannot be 'judge'"):
        replay(ReplayConfig(step=kept))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_replay_on_the_ranks_of_the_run_and_on_one_process(
    stage: str, layout: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    planted = plant(tiny, tmp_path / "planted", "policy", HUGE["fp32"])
    said = run_ranks(ended_and_replayed, 2, stage, tiny, planted, layout)
    outs = [out for _, out in said]
    assert len({message for message, _ in said}) == 1 and outs[1] == ""
    assert f": {PLACE} (ColumnParallelLinear)" in outs[0] and "reproduced" in outs[0]
    alone = report(capsys, kept_of(tmp_path))
    assert f"rank 0: {PLACE} (ColumnParallelLinear)" in alone and "reproduced" in alone


def ended_and_replayed(stage: str, files: Path, planted: Path, layout: str) -> tuple[str, str]:
    message = ended(stage, files, planted, layout=LAYOUTS[layout])
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.replay.replay.say", said.append)
        replay(ReplayConfig(step=kept_of(planted.parent)))
    return message, "\n".join(said)
