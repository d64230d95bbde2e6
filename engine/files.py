"""Read the user's files and write our own, whole or not at all; every failure is one sentence."""

import contextlib
import difflib
import itertools
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError, named

_LFS_POINTER = b"version https://git-lfs"
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial", re.DOTALL)
_MAX_JSON_BYTES = 64 << 20  # of a file that is read as one value; our choice: ours are a few MB
_FILE_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".gz", ".zst", ".xz", ".bz2", ".txt", ".md", ".csv", ".tsv"),
    *(".parquet", ".arrow", ".model", ".bpe"),
)
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
        why = link_to_nothing(path) or f": no such file; {near_names(path)}"
        raise UserError(f"{name}{why}") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except ValueError as error:  # a NUL, half of a surrogate pair
        raise UserError(f"{name} cannot be a path: {error}") from None
    if path.is_dir():
        raise UserError(f"{name} is a folder; name one file in it")
    why = ": write what comes through the pipe into a file" if path.is_fifo() else ""
    raise UserError(f"{name} is no regular file, and is not read{why}")


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


def hub_name(path: Path, option: str = "") -> str:
    """Return what to say of a path that does not exist and may be a name on Hugging Face's hub.

    option: of `hf download`, for what is no model.
    """
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(path))
    if not is_name or len(path.parts) > 1 and Path(path.parts[0]).exists():
        return ""
    if path.parts[0] == "runs":  # where the recipes have their folders, which are not there yet
        return ""
    if path.suffix in _FILE_ENDINGS:
        return ""
    return (
        "; if that is a name on Hugging Face's hub: nothing here uses the network. "
        f"`hf download {option}{path}` fetches it and says into which folder; give that one"
    )


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


def near_names(path: Path) -> str:
    """Return which names like that of a file that is not there its folder has."""
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
