import os
from pathlib import Path

import pytest

from engine.checkpoints import whole
from engine.checkpoints.manifest import Manifest, digest_of_file, write_manifest
from engine.checkpoints.pointers import pointed_checkpoint, steps_in
from engine.checkpoints.whole import damage_of, newest_whole, warn
from engine.errors import UserError
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.ranks import run_ranks
from tests.special_files import KINDS, make_special

NAMES = ("progress.json", "policy/weights-00000.safetensors", "policy/weights-00001.safetensors")


def checkpoint(directory: Path, step: int, said: int | None = None) -> Path:
    folder = directory / f"step_{step:08d}"
    (folder / "policy").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(f"{name} of {step}")
    files = {name: digest_of_file(folder / name) for name in NAMES}
    write_manifest(folder, Manifest(step=step if said is None else said, files=files))
    return folder


def test_whole_checkpoint_has_no_damage(tmp_path: Path):
    assert damage_of(checkpoint(tmp_path, 1)) == ""


def test_damage_is_seen_though_the_file_was_whole_a_moment_ago(tmp_path: Path):
    folder = checkpoint(tmp_path, 1)
    path = folder / NAMES[1]
    assert damage_of(folder) == ""
    times = path.stat()
    content = path.read_text()
    path.write_text(content.swapcase())  # of the same size, and, below, of the same time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert damage_of(folder).startswith(f"{path}: damaged: its checksum")
    path.write_text(content)
    assert damage_of(folder) == ""


def test_what_was_found_as_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = checkpoint(tmp_path, 1)
    read: list[str] = []
    check = whole.check_files
    monkeypatch.setattr(
        whole, "check_files", lambda f, m, names: (read.extend(names), check(f, m, names))[1]
    )
    damage_of(folder)
    damage_of(folder)
    assert sorted(read) == sorted(NAMES)


def test_only_needed_files_are_looked_at(tmp_path: Path):
    folder = checkpoint(tmp_path, 1)
    (folder / "progress.json").unlink()
    assert damage_of(folder, lambda name: name.startswith("policy/")) == ""
    assert damage_of(folder) == f"{folder / 'progress.json'}: No such file or directory"


def test_files_of_another_step_are_damage(tmp_path: Path):
    """A whole checkpoint that was copied in the place of another."""
    folder = checkpoint(tmp_path, 8, said=6)
    assert damage_of(folder) == f"{folder / 'manifest.json'}: damaged: it is that of step 6"
    renamed = folder.rename(tmp_path / "the_best")  # which says no step
    assert damage_of(renamed) == ""


def test_newest_whole_is_the_first_of_the_candidates_that_is(tmp_path: Path):
    folders = [checkpoint(tmp_path, step) for step in (8, 6, 4)]
    assert newest_whole(folders) == (folders[0], "")
    assert newest_whole(folders, damage="latest is garbled") == (folders[0], "latest is garbled")
    (folders[0] / NAMES[1]).unlink()
    (folders[1] / "manifest.json").unlink()
    found, damage = newest_whole(folders)
    assert found == folders[2] and str(folders[0] / NAMES[1]) in damage
    assert newest_whole(folders[:2])[0] is None
    assert newest_whole([]) == (None, "")


def test_steps_are_listed_newest_first(tmp_path: Path):
    for name in ("step_00000002", "step_00000010", "epoch_0001", "step_00000011.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000099").touch()  # no folder
    assert [path.name for path in steps_in(tmp_path)] == ["step_00000010", "step_00000002"]
    assert steps_in(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "content", ["step_00000002", "step_00000002\n", " step_00000002 \r\n", "step_2", "step_2/\n"]
)
def test_pointer_names_a_checkpoint_beside_it(content: str, tmp_path: Path):
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "latest").write_text(content)
    assert pointed_checkpoint(tmp_path / "latest") == tmp_path / "step_00000002"


@pytest.mark.parametrize(
    "content",
    ["", "\0", "..", "../step_00000002", "/tmp/step_00000002", "step_00000002/policy", "step_x2"]
    + ["step_00000002\nstep_00000003", "STEP_00000002", "step_٠٠٠٠٠٠٠٢", "x" * 10**6],
)
def test_pointer_to_anything_else_is_damage(content: str, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    (folder / "step_00000002").mkdir(parents=True)
    (tmp_path / "step_00000002").mkdir()
    (folder / "latest").write_text(content)
    with pytest.raises(UserError, match="latest: damaged: .* is no checkpoint's name"):
        pointed_checkpoint(folder / "latest")


def test_pointer_to_what_is_gone_or_no_folder_is_damage(tmp_path: Path):
    (tmp_path / "latest").write_text("step_00000002")
    with pytest.raises(UserError, match="names step_00000002, which is not there"):
        pointed_checkpoint(tmp_path / "latest")
    (tmp_path / "step_00000002").touch()
    with pytest.raises(UserError, match="names step_00000002, which is not there"):
        pointed_checkpoint(tmp_path / "latest")


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_is_no_pointer(kind: str, tmp_path: Path):
    make_special(tmp_path / "latest", kind)
    with pytest.raises(UserError, match="latest"):
        pointed_checkpoint(tmp_path / "latest")


def test_warning_is_said_once(capsys: pytest.CaptureFixture[str]):
    warn("of this test alone")
    warn("of this test alone")
    assert capsys.readouterr().err == "WARNING: of this test alone\n"


def look_together(folder: Path) -> dict[str, object]:
    """Return what a rank reads, and what all find."""
    start_parallel(ParallelLayout(), seed=0)
    read: list[str] = []
    check = whole.check_files
    whole.check_files = lambda f, m, names: (read.extend(names), check(f, m, names))[1]  # type: ignore[assignment]
    return {"damage": damage_of(folder), "read": read}


@pytest.mark.parametrize("damaged", [None, *NAMES, "manifest.json"])
def test_ranks_share_the_files_and_all_learn_of_damage(damaged: str | None, tmp_path: Path):
    folder = checkpoint(tmp_path, 1)
    if damaged:
        (folder / damaged).write_bytes(b"\0" * (folder / damaged).stat().st_size)
    first, second = run_ranks(look_together, 2, folder)
    assert first["damage"] == second["damage"]
    assert (str(folder / (damaged or "")) in first["damage"]) == bool(damaged)
    if damaged != "manifest.json":
        assert first["read"] == [NAMES[1], NAMES[0]]
        assert second["read"] == [NAMES[2]]


def look_from(folders: list[Path], checkpoint: Path) -> str:
    """What a rank finds of a checkpoint whose path is relative, each in a folder of its own."""
    start_parallel(ParallelLayout(tp=3), seed=0)
    os.chdir(folders[int(os.environ["RANK"])])
    try:
        return damage_of(checkpoint)
    except UserError as error:
        return str(error)


def test_ranks_that_find_another_whole_checkpoint_of_that_name_are_named(tmp_path: Path):
    folder = checkpoint(tmp_path / "a", 1)
    other = checkpoint(tmp_path / "b", 1)
    (other / NAMES[0]).write_text("another")
    files = {name: digest_of_file(other / name) for name in NAMES}
    write_manifest(other, Manifest(step=1, files=files))
    name = Path(folder.name)
    said = run_ranks(look_from, 3, [folder.parent, other.parent, folder.parent], name)
    words = "rank 1 found another checkpoint there than rank 0; have all nodes see the same files"
    assert said == [f"{name}: {words}"] * 3
    assert run_ranks(look_from, 3, [folder.parent] * 3, name) == [""] * 3
