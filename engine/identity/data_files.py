"""A file of data as a run knows it again: its digest, what was read of it, and what the file system
says of it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from engine.checkpoints.manifest import digest_of_file
from engine.errors import UserError
from engine.files import open_file, read_lines
from engine.printable import say

# Bytes from which an earlier digest is trusted where the file system says that nothing was written
# since. Our choice: smaller files are hashed in a tenth of a second, and always are.
_TRUSTED_BYTES = 64 << 20
_COUNTED_BYTES = 1 << 30  # up to which an error counts a file's lines, and a digest goes unsaid


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

    def is_still_there(self) -> bool:
        """Return whether nobody has written to the file since it was looked at."""
        try:
            return _state(os.stat(self.path)) == _recorded(self)
        except OSError:
            return False


def look_at(path: Path, earlier: DataFile | None = None) -> DataFile:
    """Return a file's digest; that of `earlier` where it is large and nothing was written since.

    Who sets back a file's times can hide a change of a large one; its time of change is the
    system's own. Raises UserError.
    """
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


def described(file: DataFile | None) -> str:
    """Return in a few words which content a file had, for people."""
    if file is None:
        return "none"
    count = f"{file.bytes} bytes" if file.records is None else f"{file.records} records"
    return f"{count}, {file.xxh3_128[:8]}"


def described_now(file: DataFile | None) -> str:
    """Return the same of a file that is there, with its lines where its records are not known."""
    count = _num_lines(file) if file is not None and file.records is None else ""
    return f"{count}, {file.xxh3_128[:8]}" if file is not None and count else described(file)


def _num_lines(file: DataFile) -> str:
    """Return how many lines a file has that are not empty, "" where it is no lines, or too long."""
    path = Path(file.path)
    is_lines = path.name.removesuffix(".gz").endswith((".jsonl", ".json"))
    if file.bytes > _COUNTED_BYTES or not is_lines:
        return ""
    try:
        return f"{sum(not line.isspace() for _, line in read_lines(path))} lines"
    except (UserError, OSError):
        return ""


def _state(status: os.stat_result) -> dict[str, int]:
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
