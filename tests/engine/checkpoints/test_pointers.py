import errno
from pathlib import Path

import pytest

from engine.checkpoints import pointers
from engine.checkpoints.pointers import point, pointed_checkpoint, steps_in, up_to
from engine.errors import UserError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for name in ("step_00000002", "step_00000010", "step_00000009", "epoch_0001", "step_7", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000099").touch()  # no folder
    return tmp_path


def test_a_pointer_names_a_checkpoint_beside_it(checkpoints: Path):
    for name in ("step_00000009", "epoch_0001"):
        point(checkpoints / "latest", name)
        assert pointed_checkpoint(checkpoints / "latest") == checkpoints / name
    assert not list(checkpoints.glob("*.partial"))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "is no checkpoint's name"),
        ("step_\udcff", "is no checkpoint's name"),
        (" " * 300 + "step_00000009", "is no checkpoint's name"),  # no pointer is as long
        ("x", "is no checkpoint's name"),
        ("../checkpoints/step_00000009", "is no checkpoint's name"),
        ("step_00000009/../../elsewhere", "is no checkpoint's name"),
        ("/etc", "is no checkpoint's name"),
        ("step_00000011", "names step_00000011, which is not there"),
        ("step_00000099", "names step_00000099, which is not there"),
    ],
)
def test_what_is_no_checkpoints_name_is_an_error(checkpoints: Path, text: str, cause: str):
    (checkpoints / "latest").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"latest: .*{cause}"):
        pointed_checkpoint(checkpoints / "latest")


def test_a_pointer_that_cannot_be_read_is_an_error(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="latest: no such file"):
        pointed_checkpoint(checkpoints / "latest")

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(pointers, "open_file", fail)
    with pytest.raises(UserError, match="latest: cannot be read: Input/output error"):
        pointed_checkpoint(checkpoints / "latest")


def test_a_pointer_is_the_old_one_until_it_is_the_new_one(checkpoints: Path):
    point(checkpoints / "latest", "step_00000002")
    before = (checkpoints / "latest").stat().st_ino
    point(checkpoints / "latest", "step_00000009")
    assert (checkpoints / "latest").stat().st_ino != before  # renamed over it


def test_steps_are_found_the_newest_first(checkpoints: Path):
    names = [path.name for path in steps_in(checkpoints)]
    assert names == ["step_00000010", "step_00000009", "step_00000002"]
    assert steps_in(checkpoints / "nowhere") == []


def test_only_earlier_steps_stand_in_for_one(checkpoints: Path):
    steps = steps_in(checkpoints)
    found = up_to(checkpoints / "step_00000009", steps)
    assert [path.name for path in found] == ["step_00000009", "step_00000002"]
    assert up_to(checkpoints / "epoch_0001", steps) == [checkpoints / "epoch_0001"]
