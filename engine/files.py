"""Read the user's files and write our own, whole or not at all; every failure is one sentence."""

import contextlib
import difflib
import gzip
import json
import os
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError

# The content says whether a file is gzip, not the name: a .gz may have been unpacked in place.
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_JSON_BYTES = 64 << 20  # of a file that is read as one value; our choice: ours are a few MB


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises UserError, with near names when it is missing.

    A pipe may never end, and a device does not: neither is read.
    """
    try:
        # Without waiting: to open a pipe would take until somebody writes into it.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(number).st_mode):
            return os.fdopen(number, "rb")
        os.close(number)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_near_names(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    kind = "a folder; name one file in it" if path.is_dir() else "no regular file, and is not read"
    raise UserError(f"{path} is {kind}")


def read_lines(
    path: Path, reached: Callable[[float], object] = lambda share: None
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of a plain or gzip file; raises UserError.

    `reached` is told before each line which share of the file has been read.
    """
    number = 0
    with open_file(path) as raw:
        is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        raw.seek(0)
        num_bytes = max(1, os.fstat(raw.fileno()).st_size)
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if is_gzip else raw, start=1):
                reached(raw.tell() / num_bytes)
                yield number, line
        except EOFError:
            raise UserError(
                f"{path}: the gzip data ends early, after line {number}; copy the file again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{path}: damaged gzip data after line {number} ({error}); copy the file again"
            ) from None


def read_object(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError, for a file of more bytes too."""
    with open_file(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes > max_bytes:
            raise UserError(f"{path} has {num_bytes} bytes; {max_bytes} are the most that is read")
        content = stream.read(max_bytes)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a {type(value).__name__} where an object should be")
    return value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a stream whose bytes become `path` in one step when the block ends, or never.

    Several processes may write the same path at once: each has its own partial file, the last one
    wins. Raises UserError where the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            yield stream
            sync(stream)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it was never made, or has become `path`
            partial.unlink()


def sync(stream: BinaryIO) -> None:
    """Have the disk hold what was written to a stream."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk hold which names a folder has: a file that was synced may else lack its own."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"{path.parent} has {', '.join(near)}"
    return f"{path.parent} has nothing of a similar name"
