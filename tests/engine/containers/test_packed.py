import gzip
import os
import random
from pathlib import Path

import pytest

from engine.containers import packed
from engine.containers.lines import read_lines
from engine.containers.packed import beginning_of, packing_of
from engine.errors import UserError
from tests.engine.containers.test_rows import PACKINGS


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


OTHERS = [packing for packing in PACKINGS if packing]


@pytest.mark.parametrize("packing", OTHERS)
def test_every_packing_is_told_by_its_content_and_its_members_are_joined(
    tmp_path: Path, packing: str
) -> None:
    pack, path = PACKINGS[packing], tmp_path / "a.jsonl"
    members = [b"on", b"", b"e\nt", b"wo\n" * 100_000]
    path.write_bytes(b"".join(map(pack, members)))
    assert packing_of(path.read_bytes()[:10]) == packing
    assert b"".join(line for _, line in read_lines(path)) == b"".join(members)
    assert beginning_of(path, 5) == (packing, b"one\nt")
    assert packing_of(b"BZh") == packing_of(b"") == packing_of(b"{") == ""


@pytest.mark.parametrize("packing", OTHERS)
def test_every_packing_that_ends_early_is_named(tmp_path: Path, packing: str) -> None:
    content = random.Random(0).randbytes(300_000).hex().encode()
    whole, path = PACKINGS[packing](content), tmp_path / "a.jsonl"
    for num_bytes in (14, 50, len(whole) // 2, len(whole) - 1):
        for before in (b"", whole):
            path.write_bytes(before + whole[:num_bytes])
            with pytest.raises(UserError, match=rf"the {packing} data ends early, after line \d"):
                list(read_lines(path))
    assert content.startswith(beginning_of(path, 100)[1])  # what can be had is enough to know it


@pytest.mark.parametrize("packing", OTHERS)
def test_damage_of_every_packing_is_named(tmp_path: Path, packing: str) -> None:
    whole, path = PACKINGS[packing](b"the mill is a pub\n" * 9), tmp_path / "a.jsonl"
    path.write_bytes(whole + b"no such data")
    with pytest.raises(UserError, match=rf"damaged {packing} data after line \d"):
        list(read_lines(path))
    drawn, num_refused = random.Random(0), 0
    for _ in range(100):
        content = bytearray(whole)
        content[drawn.randrange(6, len(whole))] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)
        try:
            list(read_lines(path))
        except UserError as error:
            num_refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert num_refused > (0 if packing == "zstd" else 60)  # pyarrow's frames have no checksum


@pytest.mark.parametrize("packing", OTHERS)
def test_a_bomb_of_every_packing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(packed, "_MIN_BOMB_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(PACKINGS[packing](b"x" * 1000 + b"\n" + bytes(30 << 20)))
    with pytest.raises(UserError, match=rf"\d+ bytes of {packing} data are \d+ unpacked, after"):
        list(read_lines(path, part_bytes=1 << 20))


def test_xz_that_asks_for_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_MAX_XZ_BYTES", 1 << 20)
    (tmp_path / "a.xz").write_bytes(PACKINGS["xz"](b"x" * 100))  # unpacking takes 8 MiB
    with pytest.raises(UserError, match=r"a\.xz: damaged xz data .*emory usage limit"):
        list(read_lines(tmp_path / "a.xz"))
