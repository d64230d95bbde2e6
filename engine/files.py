"""Read the user's files and write our own, whole or not at all; every failure is one sentence."""

import contextlib
import difflib
import gzip
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from engine.errors import UserError

# The content says whether a file is gzip, not the name: a .gz may have been unpacked in place.
_GZIP_MAGIC = b"\x1f\x8b"


def open_file(path: Path) -> BufferedReader:
    """Open `path` for reading; raises UserError, with near names when the file is missing."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_near_names(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name one file in it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


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
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # it was never made, or has become `path`
            partial.unlink()


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"{path.parent} has {', '.join(near)}"
    return f"{path.parent} has nothing of a similar name"
