import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.containers.lines import read_lines
from engine.errors import UserError
from engine.files import (
    check_replaceable,
    check_writable,
    clear_partials,
    hub_name,
    open_file,
    read_object,
    replacing,
    writing,
)
from tests.special_files import KINDS, make_special


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"train\.jsonl: no such file; .* has train\.jsonl\.gz"):
        open_file(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="nothing of a similar name"):
        open_file(tmp_path / "quite-other.csv")
    with pytest.raises(UserError, match="the folder .*nowhere does not exist"):
        open_file(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        open_file(tmp_path)


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which nobody writes into: to open it for reading would wait
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is no regular file, and is not read"):
            open_file(path)


def test_a_socket_is_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(UserError, match="socket"):
            open_file(tmp_path / "socket")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 256, "/".join(["a" * 200] * 100)])
@pytest.mark.parametrize("read", [open_file, read_object, lambda path: list(read_lines(path))])
def test_what_can_be_no_path_is_one_short_line(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
    assert str(tmp_path)[:20] in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line() -> None:
    path = Path("/proc/self/mem")  # regular, and without a first byte
    for read in (read_object, lambda path: list(read_lines(path))):
        with pytest.raises(UserError, match="/proc/self/mem"):
            read(path)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', "[" * 100_000, "\xff"])
def test_an_object_is_wanted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.json"):
        read_object(path)


def test_an_object_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_object(path, max_bytes=8) == {"a": 1}
    with pytest.raises(UserError, match=r"config\.json has 8 bytes; 7 are the most that is read"):
        read_object(path, max_bytes=7)


def test_replacing_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with replacing(path) as stream:
        stream.write(b"first")
    with pytest.raises(ZeroDivisionError), replacing(path) as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with replacing(path) as one, replacing(path) as other:
        one.write(b"same")
        other.write(b"same")
    assert path.read_bytes() == b"same"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), replacing(tmp_path / "file" / "x"):
        pass


def test_what_the_system_refuses_is_one_line_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (
        errno.ENOSPC,
        errno.EROFS,
        errno.EACCES,
        errno.EMFILE,
        errno.EDQUOT,
        errno.EFBIG,
    ):
        with pytest.raises(UserError) as refused, writing(path):
            raise OSError(number, os.strerror(number))
        assert str(refused.value) == f"{path}: cannot be written: {os.strerror(number)}"
    with pytest.raises(UserError, match="cannot be written: encoder error -2"), writing(path):
        raise OSError("encoder error -2")  # pillow's, without a number
    with pytest.raises(ZeroDivisionError), writing(path):
        raise ZeroDivisionError  # a bug


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    path = tmp_path / "full"
    full = "full: cannot be written: No space left on device"
    with pytest.raises(UserError, match=full), writing(path), path.open("a") as stream:
        stream.write("x")


def test_a_folder_that_can_be_written_is_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"{folder}: cannot be written"):
            check_writable(folder)


@pytest.mark.parametrize("kind", [None, "file", *KINDS])
def test_only_a_folder_stands_where_no_file_can_be_put(tmp_path: Path, kind: str | None) -> None:
    path = tmp_path / "name"
    if kind == "file":
        path.touch()
    elif kind is not None:
        make_special(path, kind)
    if kind == "folder":
        with pytest.raises(UserError, match=f"{path} is a folder where a file is to be written"):
            check_replaceable(path)
        return
    check_replaceable(path)
    with replacing(path) as stream:
        stream.write(b"there")
    assert path.read_bytes() == b"there"


def test_partial_files_are_cleared_of_one_name_or_of_all(tmp_path: Path) -> None:
    ending = f"{'0f' * 16}.partial"
    killed = [f".a.json.{ending}", f".b.json.{ending}", f".a.json.partial.{ending}"]
    others = [f"a.json.{ending}", ".a.json.partial", f".a.json.0{ending[1:].upper()}", ".a.json"]
    for name in (*killed, *others):
        (tmp_path / name).touch()
    clear_partials(tmp_path / "nowhere")
    clear_partials(tmp_path, "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {*killed[1:], *others}
    clear_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_the_name_that_is_cleared_is_the_one_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"), replacing(tmp_path / "a") as stream:
        stream.write(b"half")
        clear_partials(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-1.4b", "Qwen/Qwen2.5-0.5B"])
def test_what_may_be_a_name_on_the_hub_is_answered_with_the_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"nothing here uses the network. `hf download {name}` fetches" in hub_name(Path(name))


@pytest.mark.parametrize("name", ["/a/b", "runs/sft", "../gpt2", "a/b/c", "train.jsonl", "a b"])
def test_other_paths_are_no_names_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_name(Path(name)) == ""
