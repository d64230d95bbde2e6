import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest
import xxhash

from engine.errors import UserError
from engine.identity import data_files
from engine.identity.data_files import (
    DataFile,
    changed_files,
    described,
    described_now,
    look_at,
    without_paths,
)
from engine.identity.record import Identity, changes
from engine.settings.saved import load_config, save_config
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


@pytest.mark.parametrize("option", ["rows", "rows/*.jsonl", "rows/a.jsonl", "rows/a.jsonl@1"])
def test_one_file_is_looked_at_again_however_it_is_named(tmp_path: Path, option: str):
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows" / "a.jsonl", [{"text": "a"}])
    found = look_at(tmp_path / option)
    assert found.is_still_there()
    assert found == look_at(tmp_path / "rows" / "a.jsonl")
    write_lines(tmp_path / "rows" / "a.jsonl", [{"text": "ab"}])
    assert not found.is_still_there()


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


def several(folder: Path, **lines: int) -> Path:
    """Write files of so many lines; return the option that names them all."""
    for name, number in lines.items():
        write_lines(folder / f"{name}.jsonl", [{name: n} for n in range(number)])
    return Path(",".join(f"{folder}/{name}.jsonl" for name in lines))


def test_one_file_is_known_as_ever_whatever_names_it(tmp_path: Path):
    several(tmp_path, a=3)
    alone = look_at(tmp_path / "a.jsonl")
    assert not alone.files
    assert alone.xxh3_128 == xxhash.xxh3_128_hexdigest((tmp_path / "a.jsonl").read_bytes())
    for named in (tmp_path, tmp_path / "*.jsonl"):
        assert look_at(named) == alone
    assert load_config(DataFile, written(tmp_path, {"path": "a", "bytes": 3})).bytes == 3


def written(folder: Path, value: dict) -> Path:
    (folder / "file.json").write_text(json.dumps(value))
    return folder / "file.json"


def test_several_files_have_one_digest_and_each_its_own(tmp_path: Path):
    both = look_at(several(tmp_path, a=3, b=2))
    assert [Path(file.path).name for file in both.files] == ["a.jsonl", "b.jsonl"]
    assert both.bytes == sum(file.bytes for file in both.files)
    assert described(both) == f"{both.bytes} bytes of 2 files, {both.xxh3_128[:8]}"
    assert both.is_still_there()
    save_config(both, tmp_path / "file.json")
    assert load_config(DataFile, tmp_path / "file.json") == both
    others = {
        named: look_at(Path(",".join(f"{tmp_path}/{part}" for part in named.split(","))))
        for named in ("b.jsonl,a.jsonl", "a.jsonl@2,b.jsonl", "a.jsonl,b.jsonl@0.5", "a.jsonl@2")
    }
    assert len({both.xxh3_128, *(other.xxh3_128 for other in others.values())}) == 5
    assert changed_files(both, others["b.jsonl,a.jsonl"]) == "another order"
    assert changed_files(both, others["a.jsonl@2"]) == "changed a.jsonl; gone b.jsonl"
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert not both.is_still_there()


def test_what_changed_among_several_files_is_said(tmp_path: Path):
    before = look_at(several(tmp_path, a=3, b=2, c=1))
    now = look_at(several(tmp_path, a=3, b=4, d=1))
    assert changed_files(before, now) == "changed b.jsonl; added d.jsonl; gone c.jsonl"
    kept = without_paths(before)
    gone = [kept.files[index].xxh3_128[:8] for index in (1, 2)]
    assert changed_files(kept, now) == f"added b.jsonl, d.jsonl; gone {', '.join(gone)}"
    assert changed_files(look_at(tmp_path / "a.jsonl"), look_at(tmp_path / "b.jsonl")) == ""
    (tmp_path / "e.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())  # the same once more
    assert changed_files(now, look_at(Path(f"{now.path},{tmp_path}/e.jsonl"))) == "added e.jsonl"
    assert changed_files(look_at(tmp_path / "a.jsonl"), now) == "added b.jsonl, d.jsonl"
    identities = [Identity(data={"data.train": file}) for file in (before, now)]
    [change] = changes(*identities)
    assert change.new.endswith(" (changed b.jsonl; added d.jsonl; gone c.jsonl)")
    assert not changes(identities[0], Identity(data={"data.train": kept}))


def test_large_files_of_several_are_read_again_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_files, "_TRUSTED_BYTES", 4)
    read, paths = reads(monkeypatch), several(tmp_path, a=3, b=2)
    first = look_at(paths)
    write_lines(tmp_path / "b.jsonl", [{"b": "new"}])
    again = look_at(paths, first)
    assert [path.name for path in read] == ["a.jsonl", "b.jsonl", "b.jsonl"]
    assert again.files[0] == first.files[0]
    assert changed_files(first, again) == "changed b.jsonl"
