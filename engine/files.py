"""Read the user's files and write our own, whole or not at all; every failure is one sentence."""

import contextlib
import difflib
import io
import itertools
import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError, named

# The content says whether a file is gzip, not the name: a .gz may have been unpacked in place.
_GZIP_MAGIC = b"\x1f\x8b"
_LFS_POINTER = b"version https://git-lfs"
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial", re.DOTALL)
_MAX_JSON_BYTES = 64 << 20  # of a file that is read as one value; our choice: ours are a few MB
MAX_LINE_BYTES = 16 << 20
"""Of a line that is read whole. Our choice: several times the longest book, and what a tokenizer
makes of it (150 bytes a byte, measured) fits a small machine."""
_MAX_EMPTY_BYTES = 4 << 20  # by which empty lines may outweigh all others; our choice: seconds
# gzip expands at most 1,030 times, at its fastest 230 times, and text of any use 3 to 30 times:
# data repeats itself, but less within the 32 KiB that gzip sees. Our choice: from 128 MiB on, what
# expands 100 times is a bomb.
_MAX_EXPANSION = 100
_MIN_BOMB_BYTES = 128 << 20
_MAX_EMPTY_MEMBERS = 1000  # in a row; our choice: block gzip (BGZF) ends with one
_FILE_ENDINGS = (".json", ".jsonl", ".gz", ".txt", ".csv", ".parquet", ".model", ".bpe")
_LINES_A_SHARE = 64  # between two times that a share is told
_PACKED_BYTES = 1 << 16
_UNPACKED_BYTES = 1 << 17
_MAX_NAMES = 10_000  # of a folder that are compared with one that is missing
MAX_SHOWN_PATH = 300
"""Characters of a path in an error."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises UserError, with near names when it is missing.

    A pipe may never end, and a device does not: neither is read.
    """
    name = named(path, MAX_SHOWN_PATH)
    try:
        # Without waiting: to open a pipe would take until somebody writes into it.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(number).st_mode):
            return os.fdopen(number, "rb")
        os.close(number)
    except FileNotFoundError:
        why = link_to_nothing(path) or f": no such file; {_near_names(path)}"
        raise UserError(f"{name}{why}") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except ValueError as error:  # a NUL, half of a surrogate pair
        raise UserError(f"{name} cannot be a path: {error}") from None
    kind = "a folder; name one file in it" if path.is_dir() else "no regular file, and is not read"
    raise UserError(f"{name} is {kind}")


def link_to_nothing(path: Path) -> str:
    """Return what to say of a path that is a link and leads nowhere; "" of any other."""
    if not path.is_symlink() or path.exists():
        return ""
    target = named(os.readlink(path), MAX_SHOWN_PATH)
    return f" is a link to nothing ({target} is gone): download or copy it again"


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Raise UserError where a file's beginning is a pointer's to the file that is meant: of a clone
    that was made without git-lfs."""
    if content.startswith(_LFS_POINTER):
        name = named(path, MAX_SHOWN_PATH)
        raise UserError(f"{name} is a git-lfs pointer and not the file: run `git lfs pull` there")


def hub_name(path: Path) -> str:
    """Return what to say of a path that does not exist and may be a name on Hugging Face's hub."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(path))
    if not is_name or len(path.parts) > 1 and Path(path.parts[0]).exists():
        return ""
    if path.parts[0] == "runs":  # where the recipes have their folders, which are not there yet
        return ""
    if path.suffix in _FILE_ENDINGS:
        return ""
    return (
        "; if that is a name on Hugging Face's hub: nothing here uses the network. "
        f"`hf download {path}` fetches it and says into which folder; give that one"
    )


def read_lines(
    path: Path,
    reached: Callable[[float], object] = lambda share: None,
    *,
    part_bytes: int | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of a plain or gzip file; raises UserError.

    `reached` is told now and then which share of the file has been read. A line over
    MAX_LINE_BYTES is an error; with part_bytes it comes in parts of so many bytes, each with the
    line's number. Errors are also what only takes time: empty lines that outweigh the others by
    megabytes, and gzip data that expand as no text does.
    """
    name = named(path, MAX_SHOWN_PATH)
    number, num_empty, num_other = 0, 0, 0
    limit = part_bytes or MAX_LINE_BYTES + 1
    with open_file(path) as raw:
        num_bytes = max(1, os.fstat(raw.fileno()).st_size)
        try:
            is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            stream = io.BufferedReader(_Unpacked(raw), _UNPACKED_BYTES) if is_gzip else raw
            ends_line = True
            while line := stream.readline(limit):
                number += ends_line
                ends_line = line.endswith(b"\n")
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{name}:{number}: a line of over {MAX_LINE_BYTES} bytes")
                if not line.isspace():
                    num_other += len(line)
                elif (num_empty := num_empty + len(line)) > num_other + _MAX_EMPTY_BYTES:
                    raise UserError(f"{name}:{number}: {num_empty} bytes to here are empty lines")
                if part_bytes or number % _LINES_A_SHARE == 0:
                    reached(raw.tell() / num_bytes)
                yield number, line
            reached(1.0)
        except EOFError:
            raise UserError(
                f"{name}: the gzip data ends early, after line {number}; copy the file again"
            ) from None
        except zlib.error as error:
            raise UserError(
                f"{name}: damaged gzip data after line {number} ({error}); copy the file again"
            ) from None
        except _Bomb as error:
            raise UserError(
                f"{name}: {error}, after line {number}; unpack the file, if it is meant so"
            ) from None
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None


class _Bomb(Exception):
    """How gzip data expand as no text does."""


class _Unpacked(io.RawIOBase):
    """The content of gzip data, of all members in turn, unpacked no further than it is read.

    Raises EOFError where the data end early, zlib.error where they are damaged, and _Bomb.
    """

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._packed = b""
        self._member: Any = None  # zlib's decompressor has no public type
        self._num_bytes = 0
        self._num_empty = 0
        self._is_empty = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer's beginning; returns how many bytes that are, 0 at the end."""
        while True:
            packed = self._packed or self._raw.read(_PACKED_BYTES)
            if self._member is None:
                self._packed = packed.lstrip(b"\0")  # padding, where a member could begin
                if not packed:
                    return 0
                if not self._packed:
                    continue
                packed, self._member = self._packed, zlib.decompressobj(wbits=31)
                self._is_empty = True
            content = self._member.decompress(packed, len(buffer))
            has_ended = self._member.eof
            if not (packed or content or has_ended):
                raise EOFError
            self._packed = self._member.unused_data if has_ended else self._member.unconsumed_tail
            self._count(len(content), has_ended)
            if has_ended:
                self._member = None
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _count(self, num_new: int, has_ended: bool) -> None:
        """Raise _Bomb where what has been unpacked so far is no text."""
        self._num_bytes += num_new
        self._is_empty = self._is_empty and not num_new
        if has_ended:
            self._num_empty = self._num_empty + 1 if self._is_empty else 0
        if self._num_empty > _MAX_EMPTY_MEMBERS:
            raise _Bomb(f"gzip data of {self._num_empty} empty members in a row")
        num_packed = self._raw.tell()
        if self._num_bytes > max(_MIN_BOMB_BYTES, _MAX_EXPANSION * num_packed):
            raise _Bomb(f"{num_packed} bytes of gzip data are {self._num_bytes} unpacked")


def read_object(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError, for a file of more bytes too."""
    name = named(path, MAX_SHOWN_PATH)
    with open_file(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes > max_bytes:
            raise UserError(f"{name} has {num_bytes} bytes; {max_bytes} are the most that is read")
        try:
            content = stream.read(max_bytes)
            refuse_lfs_pointer(path, content)
            value = json.loads(content)
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON: {error}") from None
        except MemoryError:
            raise UserError(f"{name}: as JSON it takes more memory than there is") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: a {type(value).__name__} where an object should be")
    return value


def write_object(path: Path, value: Mapping[str, Any], *, ensure_ascii: bool = True) -> None:
    """Write an object as JSON for people to read, whole or not at all; raises UserError."""
    text = json.dumps(value, indent=2, ensure_ascii=ensure_ascii)
    with replacing(path) as stream:
        stream.write((text + "\n").encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a stream whose bytes become `path` in one step when the block ends, or never.

    Several processes may write the same path at once: each has its own partial file, the last one
    wins. Raises UserError where the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as stream:
                yield stream
                sync(stream)
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it was never made, or has become `path`
            partial.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what the system has against a block that writes `path` as a UserError that names it: a
    full disk, a folder that is read-only or gone, no more file descriptors."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_writable(folder: Path) -> None:
    """Raise UserError where nothing can be written into a folder that is there."""
    probe = folder / f".probe.{uuid.uuid4().hex}.partial"
    with writing(folder):
        try:
            with probe.open("xb") as stream:
                stream.write(b"?")
        finally:
            probe.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise UserError where `replacing` could write no file, since a folder has its name."""
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path} is a folder where a file is to be written; remove or rename it")


def clear_partials(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing into a folder by `replacing`: all of it, or what
    would have become `name`. Only for who knows that nobody is writing there now."""
    with contextlib.suppress(OSError):  # there is no such folder
        for path in list(folder.iterdir()):
            found = _PARTIAL.fullmatch(path.name)
            if found and name in (None, found[1]) and not path.is_dir():
                path.unlink(missing_ok=True)


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
    folder = named(path.parent, MAX_SHOWN_PATH)
    try:
        names = [entry.name for entry in itertools.islice(os.scandir(path.parent), _MAX_NAMES)]
    except (FileNotFoundError, NotADirectoryError):
        return f"the folder {folder} does not exist"
    except OSError as error:
        return f"the folder {folder} cannot be looked into: {error.strerror}"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"{folder} has {', '.join(map(named, near))}"
    return f"{folder} has nothing of a similar name"
