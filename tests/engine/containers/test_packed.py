import gzip
import os
from pathlib import Path

import pytest

from engine.containers import packed
from engine.containers.lines import read_lines
from engine.errors import UserError


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


def test_gzip_expands_as_far_as_text_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_MIN_BOMB_BYTES", 1 << 20)
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
