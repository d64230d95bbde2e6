import dataclasses
import gzip
import os
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.identity import data_files
from engine.identity.data_files import described, described_now, look_at
from tests.tiny import write_lines


def test_digest_is_of_the_bytes(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc\n")
    first = look_at(path)
    assert (first.bytes, first.path) == (4, str(path))
    path.write_bytes(b"abd\n")
    assert look_at(path).xxh3_128 != first.xxh3_128
    path.write_bytes(b"abc\n")
    assert look_at(path).xxh3_128 == first.xxh3_128


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that will hold the files that are read for their digests."""
    read: list[Path] = []
    digest = data_files.digest_of_file
    monkeypatch.setattr(
        data_files, "digest_of_file", lambda path: (read.append(path), digest(path))[1]
    )
    return read


def test_small_file_is_always_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, path = reads(monkeypatch), tmp_path / "a.jsonl"
    path.write_bytes(b"abc\n")
    assert look_at(path, look_at(path)) == look_at(path)
    assert read == [path] * 3


def test_large_file_is_read_again_where_something_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_files, "_TRUSTED_BYTES", 4)
    read, path = reads(monkeypatch), tmp_path / "a.jsonl"
    path.write_bytes(b"abcd\n")
    first = dataclasses.replace(look_at(path), records=1)
    assert look_at(path, first) == first
    assert len(read) == 1
    times = (first.mtime_ns, first.mtime_ns)
    with path.open("r+b") as stream:  # in place, the times set back as well as one can
        stream.write(b"z")
    os.utime(path, ns=times)
    changed = look_at(path, first)
    assert len(read) == 2
    assert changed.xxh3_128 != first.xxh3_128
    replaced = tmp_path / "b.jsonl"
    replaced.write_bytes(b"abcd\n")
    os.utime(replaced, ns=times)
    replaced.replace(path)
    assert look_at(path, first).xxh3_128 == first.xxh3_128
    assert len(read) == 3
    for field in ("bytes", "mtime_ns", "ctime_ns", "inode"):
        now = look_at(path)
        look_at(path, dataclasses.replace(now, **{field: getattr(now, field) + 1}))
    assert len(read) == 3 + 8


def test_file_that_is_written_to_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc\n")
    digest = data_files.digest_of_file

    def digest_and_grow(read: Path) -> object:
        found = digest(read)
        with path.open("ab") as stream:
            stream.write(b"more\n")
        return found

    monkeypatch.setattr(data_files, "digest_of_file", digest_and_grow)
    with pytest.raises(UserError, match="written to while it was read"):
        look_at(path)


def test_file_is_still_there_until_it_is_written_to(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc\n")
    looked = look_at(path)
    assert looked.is_still_there()
    path.write_bytes(b"abcd\n")
    assert not looked.is_still_there()
    path.unlink()
    assert not looked.is_still_there()


def test_missing_file_and_pipe_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, cause in (("missing", "no such file"), ("pipe", "no regular file")):
        with pytest.raises(UserError, match=cause):
            look_at(tmp_path / name)


def test_content_is_described_by_its_records_or_lines(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    looked = look_at(path)
    digest = looked.xxh3_128[:8]
    assert described_now(looked) == f"2 lines, {digest}"
    assert described(looked) == f"{looked.bytes} bytes, {digest}"
    read = dataclasses.replace(looked, records=7)
    assert described(read) == described_now(read) == f"7 records, {digest}"
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n{"a": 3}\n'))
    assert described_now(look_at(packed)).startswith("3 lines, ")
    text = tmp_path / "c.txt"
    text.write_text("all of it\nis one document\n")
    assert described_now(look_at(text)).startswith("26 bytes, ")
    assert described(None) == described_now(None) == "none"
