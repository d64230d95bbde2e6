import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoints.__main__ import checkpoints_at, main
from engine.checkpoints.manifest import Manifest, write_manifest
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from tests.engine.checkpoints.resigned import resign
from tests.engine.checkpoints.small_runs import training
from tests.special_files import KINDS, make_special

ROOT = Path(__file__).parents[3]
METRICS = {"train/loss": 1.25, "valid/loss": float("nan")}


@pytest.fixture
def run(parallel: Parallel, tmp_path: Path) -> Path:
    """A run of two checkpoints and of weights alone."""
    found = training(tmp_path / "checkpoints", parallel)
    for step in (1, 2):
        found.step(step - 1)
        found.checkpointer.save(step, {"metrics": METRICS})
    found.checkpointer.save_weights("epoch_0001")
    return tmp_path


def test_whole_checkpoints_are_verified(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [
        [f"{run}/checkpoints/epoch_0001: whole", "3 files"],
        [f"{run}/checkpoints/step_00000001: whole", "8 files"],
        [f"{run}/checkpoints/step_00000002: whole", "8 files"],
    ]
    assert main(["verify", str(run / "checkpoints" / "step_00000001")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_each_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]):
    path = run / "checkpoints/step_00000002/policy/optimizer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    (run / "checkpoints/epoch_0001/manifest.json").unlink()
    assert main(["verify", str(run)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert "epoch_0001: no manifest.json" in first
    assert "step_00000001: whole" in second
    assert third == f"{path}: damaged: its checksum is not that of what was written"


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_damage_and_waited_for_by_nobody(
    kind: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("policy/weights-00000.safetensors", "manifest.json"):
        make_special(run / "checkpoints" / "step_00000002" / name, kind)
        assert main(["verify", str(run)]) == 1
        assert name in capsys.readouterr().out.splitlines()[-1]


def test_contents_are_shown(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    for text in ("weights alone", "step 2", "policy", "ema", "language", "4 x 32", "F32"):
        assert text in shown
    assert "train/loss 1.25  valid/loss nan" in shown
    # Words padded to 128, positions and the last norm; four layers of 12 x 32^2 + 13 x 32.
    assert f"{(128 + 64 + 2) * 32 + 4 * (12 * 32 * 32 + 13 * 32):,}" in shown


def test_a_folder_without_checkpoints_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no checkpoint here"):
            checkpoints_at(path)
        assert main(["verify", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"error: {path}: no checkpoint here (a run, or one of its checkpoints)\n"
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("progress.json", {"metrics": {"a": "b"}}),
        ("progress.json", {"metrics": {"a": 10**400}}),
        ("progress.json", {"metrics": []}),
        ("policy/tensors.json", {"counts": {"step": "x"}}),
        ("policy/tensors.json", {"counts": {"step": 10**400, "skipped": {}}}),
        ("policy/tensors.json", {"counts": {"step": None}}),
        ("policy/tensors.json", {"tensors": {"a": None}}),
    ],
)
def test_hostile_numbers_are_one_line(
    name: str, change: dict, run: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run / "checkpoints" / "step_00000002"
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    resign(folder)
    for command in ("verify", "inspect"):
        assert main([command, str(folder)]) == 1
        (*_, error) = capsys.readouterr().out.splitlines()
        assert error.startswith(str(path))


def test_what_is_no_checkpoint_or_another_steps_is_not_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run / "checkpoints"
    shutil.rmtree(folder / "step_00000002")
    shutil.copytree(folder / "step_00000001", folder / "step_00000002")
    write_manifest(folder / "epoch_0001", Manifest(step=None, files={}))
    (folder / "selected").write_text("epoch_0003")
    assert main(["verify", str(run)]) == 1
    empty, whole, other, pointer = capsys.readouterr().out.splitlines()
    assert empty.endswith("epoch_0001: damaged: it holds no network")
    assert "step_00000001: whole" in whole
    assert other.endswith("step_00000002: damaged: it holds step 1")
    assert pointer.endswith("selected: names epoch_0003, which is not there")


def test_one_damaged_checkpoint_hides_no_other(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "checkpoints/step_00000001/manifest.json").write_text("{}")
    assert main(["inspect", str(run)]) == 1
    shown = capsys.readouterr().out
    assert "step_00000001/manifest.json: damaged" in shown
    assert "step 2" in shown and "latest" in shown


@pytest.mark.parametrize("value", ["\x1b]52;c;x\x07", "x" * 10**5, 10**400, [[]], None])
def test_hostile_descriptions_are_shown_in_a_few_harmless_characters(
    value: object, run: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run / "checkpoints" / "step_00000002"
    path = folder / "policy" / "network.json"
    path.write_text(json.dumps({"kind": value, "size": {"num_layers": value}}))
    progress = folder / "progress.json"
    progress.write_text(json.dumps({"step": 2, "metrics": {str(value)[:500]: 1.0}}))
    resign(folder)
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and len(shown) < 5_000


def test_it_is_a_command(run: Path):
    command = [sys.executable, "-m", "engine.checkpoints", "verify", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("whole") == 3
