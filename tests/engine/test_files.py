import errno
import gzip
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import files
from engine.errors import UserError
from engine.files import (
    MAX_LINE_BYTES,
    check_replaceable,
    check_writable,
    clear_partials,
    open_file,
    read_lines,
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


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    content = b"one\ntwo"
    (tmp_path / "plain.gz").write_bytes(content)
    (tmp_path / "packed.txt").write_bytes(gzip.compress(content))
    expected = [(1, b"one\n"), (2, b"two")]
    assert list(read_lines(tmp_path / "plain.gz")) == expected
    assert list(read_lines(tmp_path / "packed.txt")) == expected


def test_truncated_gzip_names_the_file_and_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(b"line\n" * 1000)[:-8])
    with pytest.raises(UserError, match=r"cut\.gz: the gzip data ends early, after line \d+"):
        list(read_lines(path))


def test_damaged_gzip_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.gz"
    content = bytearray(gzip.compress(bytes(range(256)) * 100))
    content[20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.gz: (damaged gzip data|the gzip data ends early)"):
        list(read_lines(path))


def test_members_of_gzip_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "joined.gz"
    members = [b"on", b"", b"e\nt", b"wo\n" * 100_000]
    path.write_bytes(b"".join(map(gzip.compress, members)) + bytes(700))
    assert b"".join(line for _, line in read_lines(path)) == b"".join(members)
    path.write_bytes(gzip.compress(b"one\n") + b"more")
    with pytest.raises(UserError, match=r"joined\.gz: damaged gzip data after line \d"):
        list(read_lines(path))


@pytest.mark.parametrize("num_bytes", [2, 9, 15, 30, 200, -1, -8])
def test_gzip_that_ends_early_is_never_whole(tmp_path: Path, num_bytes: int) -> None:
    packed = gzip.compress(os.urandom(1000))
    (tmp_path / "cut.gz").write_bytes(packed + packed[:num_bytes])
    with pytest.raises(UserError, match=r"cut\.gz: the gzip data ends early, after line \d+"):
        list(read_lines(tmp_path / "cut.gz"))


def test_a_checksum_that_is_wrong_is_damage(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"one\n"))
    packed[-6] ^= 1
    (tmp_path / "bad.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"bad\.gz: damaged gzip data"):
        list(read_lines(tmp_path / "bad.gz"))


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1)])
def test_a_line_has_so_many_bytes_at_most(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "long.jsonl"
    longest = b"x" * (MAX_LINE_BYTES - 1) + b"\n"
    path.write_bytes(pack(b"a\n" + longest + b"b"))
    assert [line for _, line in read_lines(path)] == [b"a\n", longest, b"b"]
    path.write_bytes(pack(b"a\nx" + longest + b"b"))
    with pytest.raises(UserError, match=rf"long\.jsonl:2: a line of over {MAX_LINE_BYTES} bytes"):
        list(read_lines(path))
    parts = list(read_lines(path, part_bytes=MAX_LINE_BYTES // 2))
    assert [number for number, _ in parts] == [1, 2, 2, 2, 3]
    assert b"".join(part for _, part in parts) == b"a\nx" + longest + b"b"


def test_a_file_without_a_newline_takes_no_more_memory_than_a_line(tmp_path: Path) -> None:
    (tmp_path / "zeros").touch()
    os.truncate(tmp_path / "zeros", 1 << 40)
    with gzip.open(tmp_path / "zeros.gz", "wb", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(bytes(1 << 20))
    for name in ("zeros", "zeros.gz"):
        tracemalloc.start()
        with pytest.raises(UserError, match=rf"{name}:1: a line of over"):
            list(read_lines(tmp_path / name))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 4 * MAX_LINE_BYTES


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1)])
@pytest.mark.parametrize("line", [b"\n", b" " * 999 + b"\n"])
def test_empty_lines_do_not_go_on_for_ever(
    tmp_path: Path, line: bytes, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(pack(b"a\n" + line * ((5 << 20) // len(line))))
    with pytest.raises(UserError, match=r"empty\.jsonl:\d+: \d+ bytes to here are empty lines"):
        list(read_lines(path))
    path.write_bytes(pack((b"abcd\n" + line[-3:] * 2) * 100_000))  # every other line is ordinary
    assert sum(1 for _ in read_lines(path)) > 100_000


def test_gzip_expands_as_far_as_text_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MIN_BOMB_BYTES", 1 << 20)
    path = tmp_path / "packed.gz"
    line = b"the mill is a cheap pub near the river, and it serves French food\n"
    path.write_bytes(gzip.compress(line * 10_000))  # less than a bomb, however it expands
    assert sum(1 for _ in read_lines(path)) == 10_000
    path.write_bytes(gzip.compress(line * 100_000))
    with pytest.raises(UserError, match=r"packed\.gz: \d+ bytes of gzip data are \d+ unpacked"):
        list(read_lines(path))
    for level in (1, 9):
        path.write_bytes(gzip.compress(line * 100_000, level))
        with pytest.raises(UserError, match="bytes of gzip data are"):
            list(read_lines(path))
        varied = b"".join(b"%d %s" % (number, line) for number in range(100_000))
        path.write_bytes(gzip.compress(varied, level))
        assert sum(1 for _ in read_lines(path)) == 100_000


def test_empty_members_do_not_go_on_for_ever(tmp_path: Path) -> None:
    path, empty = tmp_path / "members.gz", gzip.compress(b"")
    path.write_bytes((empty * 1000 + gzip.compress(b"a\n")) * 2)
    assert sum(1 for _ in read_lines(path)) == 2
    path.write_bytes(empty * 2000)
    with pytest.raises(UserError, match=r"members\.gz: gzip data of 1001 empty members"):
        list(read_lines(path))


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
