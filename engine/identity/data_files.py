"""A file of data, or several, as a run knows it again: its digest, what was read of it, and what
the file system says of it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from engine.checkpoints.manifest import digest_of_file
from engine.containers.kinds import ENDINGS, ending_of
from engine.containers.lines import read_lines
from engine.containers.sources import sources_of
from engine.errors import UserError
from engine.files import open_file
from engine.printable import say

# Bytes from which an earlier digest is trusted where the file system says that nothing was written
# since. Our choice: smaller files are hashed in a tenth of a second, and always are.
_TRUSTED_BYTES = 64 << 20
_COUNTED_BYTES = 1 << 30  # up to which an error counts a file's lines, and a digest goes unsaid
_SHOWN_FILES = 5  # of several that differ; our choice


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """What a run knows of a file that it read."""

    path: str = ""
    bytes: int = 0
    xxh3_128: str = ""
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    records: int | None = None
    """That were read; None where it is not known, as of all counts here."""
    skipped: int | None = None
    """Bad lines that were left out."""
    kept: int | None = None
    """Records that were within the limits of length."""
    dropped: int | None = None
    """Records that were not."""
    weight: float = 1.0
    """How often its records count, where it is one of several."""
    files: tuple["DataFile", ...] = ()
    """Where the option names several, or one with a weight: each, in the order in which they are
    read."""

    def is_still_there(self) -> bool:
        """Return whether nobody has written to the file since it was looked at."""
        if self.files:
            return all(file.is_still_there() for file in self.files)
        try:
            return _state(os.stat(self.path)) == _recorded(self)
        except OSError:
            return False


def look_at(path: Path, earlier: DataFile | None = None) -> DataFile:
    """Return the digest of what a path names; that of `earlier` where a file is large and nothing
    was written since.

    Who sets back a file's times can hide a change of a large one; its time of change is the
    system's own. Raises UserError.
    """
    named = [(file, source.weight) for source in sources_of(path) for file in source.files]
    if len(named) == 1 and named[0][1] == 1:
        return _look_at_file(named[0][0], earlier)
    known = {file.path: file for file in earlier.files} if earlier is not None else {}
    files = tuple(
        replace(_look_at_file(file, known.get(str(file))), weight=weight) for file, weight in named
    )
    return DataFile(
        path=str(path),
        bytes=sum(file.bytes for file in files),
        xxh3_128=xxhash.xxh3_128_hexdigest(" ".join(map(_content, files)).encode()),
        files=files,
    )


def _look_at_file(path: Path, earlier: DataFile | None) -> DataFile:
    with open_file(path) as stream:
        state = _state(os.fstat(stream.fileno()))
    if earlier is not None and state["bytes"] >= _TRUSTED_BYTES and state == _recorded(earlier):
        return replace(earlier, path=str(path))
    if state["bytes"] > _COUNTED_BYTES:
        say(f"{path}: {state['bytes'] / 1e9:.1f} GB are read for their digest")
    found = digest_of_file(path)
    looked = DataFile(path=str(path), xxh3_128=found.xxh3_128, **state)
    if found.bytes != looked.bytes or not looked.is_still_there():
        raise UserError(f"{path}: written to while it was read; start again when it is whole")
    return looked


def without_paths(file: DataFile) -> DataFile:
    """Return what is the same of a file wherever it lies, and whenever it was written."""
    files = tuple(map(without_paths, file.files))
    return replace(file, path="", mtime_ns=0, ctime_ns=0, inode=0, files=files)


def changed_files(old: DataFile, new: DataFile) -> str:
    """Return in words which of several files are others now, "" where there is one on both sides.

    A file is known by its name, and where that was not kept by its content.
    """
    if not old.files and not new.files:
        return ""
    before, after = (file.files or (file,) for file in (old, new))
    names_before = {Path(file.path).name for file in before}
    names_after = {Path(file.path).name for file in after}
    said: dict[str, list[str]] = {"changed": [], "added": [], "gone": []}
    for file in _not_among(before, after):
        name = Path(file.path).name
        said["changed" if name in names_before else "added"].append(name)
    for file in _not_among(after, before):
        if (name := Path(file.path).name) not in names_after:
            said["gone"].append(name or file.xxh3_128[:8])
    parts = [f"{what} {', '.join(each[:_SHOWN_FILES])}" for what, each in said.items() if each]
    return "; ".join(parts) or "another order"


def _not_among(others: Sequence[DataFile], files: Sequence[DataFile]) -> Iterator[DataFile]:
    """Yield the files whose content the others have not, or have not as often."""
    unmatched = Counter(map(_content, others))
    for file in files:
        if unmatched[_content(file)]:
            unmatched[_content(file)] -= 1
        else:
            yield file


def _content(file: DataFile) -> str:
    return file.xxh3_128 + ("" if file.weight == 1 else f"@{file.weight:g}")


def described(file: DataFile | None) -> str:
    """Return in a few words which content a file had, for people."""
    if file is None:
        return "none"
    count = f"{file.bytes} bytes" if file.records is None else f"{file.records} records"
    count += f" of {len(file.files)} files" if file.files else ""
    return f"{count}, {file.xxh3_128[:8]}"


def described_now(file: DataFile | None) -> str:
    """Return the same of a file that is there, with its lines where its records are not known."""
    count = _num_lines(file) if file is not None and file.records is None else ""
    return f"{count}, {file.xxh3_128[:8]}" if file is not None and count else described(file)


def _num_lines(file: DataFile) -> str:
    """Return how many lines a file has that are not empty, "" where it is no lines, or too long."""
    path = Path(file.path)
    is_lines = ending_of(path) in ENDINGS["JSON"]
    if file.bytes > _COUNTED_BYTES or not is_lines or file.files:
        return ""
    try:
        return f"{sum(not line.isspace() for _, line in read_lines(path))} lines"
    except (UserError, OSError):
        return ""


def _state(status: os.stat_result) -> dict[str, Any]:
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _recorded(file: DataFile) -> dict[str, int]:
    return {
        "bytes": file.bytes,
        "mtime_ns": file.mtime_ns,
        "ctime_ns": file.ctime_ns,
        "inode": file.inode,
    }
