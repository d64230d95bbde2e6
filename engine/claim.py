"""Who may write into a folder: one run at a time, until its process ends.

A run holds a lock on a file, FOLDER/.lock, in which it says who it is. The system drops the lock
with the process, however that ends: what a killed run leaves is a file that nobody holds. What only
reads a run takes no lock.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError
from engine.files import open_file, sync_folder, writing
from engine.printable import ERROR_CHARACTERS, say

LOCK = ".lock"
UNFINISHED = "sources.partial"
"""A folder in a claimed one that does not outlive the claim, unless its process is killed."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# A link could lead to another's file, and a pipe would wait for somebody.
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_BYTES = 8192  # of what a lock says; our choice, above what we write
_SHOWN_CHARACTERS = 200  # of a command, in an error; our choice
_TRIES = 20  # at a file that its holder removes meanwhile; our choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Held:
    """A lock that this process holds."""

    lock: Path
    number: int
    """Of the open file."""
    words: bytes
    """What was written into it; nothing where it keeps nobody out."""
    made: tuple[Path, ...]
    """Folders that were made for it, the outermost first."""


_held: dict[Path, _Held] = {}


@contextlib.contextmanager
def holding_claims() -> Iterator[None]:
    """Hold what is claimed in this block to its end, and then give it up. Also a decorator.

    Blocks nest. A folder that was made for its lock, and has got nothing else, goes too: so a
    mistake of the user's leaves none.
    """
    before = set(_held)
    try:
        yield
    finally:
        for lock in [lock for lock in _held if lock not in before]:
            _give_up(_held.pop(lock))


def claim(folder: Path, lock: Path | None = None) -> None:
    """Make this process the one that writes into a folder, which is made where it is missing.

    lock: the file that is locked, where the folder cannot hold it because it will be renamed.
    Nothing changes where this process has claimed it before. Raises UserError where another process
    has, or where nothing can be written. A file system without locks is told of and accepted: there
    are such on clusters, and a run on one is in order as long as it is alone.
    """
    lock = (lock or folder / LOCK).absolute()
    if lock in _held:
        return
    with writing(lock):
        for _ in range(_TRIES):
            made = _make_folders(lock.parent)
            number = os.open(lock, _OPEN, 0o666)
            held = _Held(lock=lock, number=number, words=_words(), made=made)
            try:
                has_locks = _lock(number, folder, lock)
            except BaseException:
                os.close(number)
                raise
            if has_locks and not _is_at(lock, number):  # its holder has just removed it
                os.close(number)
                continue
            try:
                os.ftruncate(number, 0)
                os.pwrite(number, held.words, 0)
                os.fsync(number)  # over a network it may else be seen when the file is closed
            except BaseException:
                _give_up(held)
                raise
            _held[lock] = held if has_locks else dataclasses.replace(held, words=b"")
            return
    raise UserError(f"{lock}: other runs come and go in this folder; start again")


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, claimed by this process, which becomes `folder` when the
    block ends, or goes. UserError where `folder` is there, or another process makes it."""
    partial = folder.with_name(f"{folder.name}.partial")
    claim(folder, folder.with_name(f".{folder.name}.lock"))
    if os.path.lexists(folder):
        raise UserError(f"--out {folder} exists already; name a new folder, or remove it")
    try:
        with writing(partial):
            if os.path.lexists(partial):  # of a killed start
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        yield partial
        with writing(folder):
            partial.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_claim(folder: Path) -> None:
    """Raise UserError where a folder that this process has claimed is another's by now: it was
    moved away while a run wrote into it, and the next one has begun in its place."""
    held = _held.get((folder / LOCK).absolute())
    if held is None or not held.words:
        return
    try:
        words = held.lock.read_bytes()
    except OSError:
        if not folder.exists():
            raise UserError(f"{folder}: the folder was removed while a run wrote into it") from None
        return
    if words != held.words:
        raise UserError(
            f"{folder}: the folder was moved while a run wrote into it, and is another's now: "
            f"{_holder(held.lock)}"
        )


def words_of(lock: Path) -> str:
    """Return what the holder of a lock has written into it, "" where none is to be read."""
    try:
        with open_file(lock) as stream:
            return stream.read(_MAX_BYTES).decode(errors="replace")
    except (UserError, OSError):
        return ""


def _make_folders(folder: Path) -> tuple[Path, ...]:
    """Make a folder and those above it; return the ones that were missing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(reversed(missing))


def _lock(number: int, folder: Path, lock: Path) -> bool:
    """Lock an open file; return whether the file system can. UserError where another holds it."""
    if not stat.S_ISREG(os.fstat(number).st_mode):
        raise UserError(f"{lock} is no regular file; remove it")
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            say(
                f"WARNING: {folder}: its file system has no locks ({error.strerror}): nothing "
                "keeps a second run out of this folder",
                stream=sys.stderr,
                limit=ERROR_CHARACTERS,
            )
            return False
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(
            f"{folder}: another run writes into this folder: {_holder(lock)}; wait for it, end it, "
            "or name another folder"
        ) from None
    return True


def _words() -> bytes:
    """Return who this process is, for those that are refused."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    words = {
        "pid": os.getpid(),
        "node": socket.gethostname(),
        "started": now,
        "command": shlex.join(sys.argv)[:_SHOWN_CHARACTERS],
    }
    return json.dumps(words).encode() + b"\n"


def _holder(lock: Path) -> str:
    """Return who holds a lock, in words, as far as its file says it: on one line."""
    try:
        words = json.loads(words_of(lock))
        told = [str(words[key]) for key in ("pid", "node", "started", "command")]
    except (ValueError, RecursionError, TypeError, KeyError):
        return f"its process has not said who it is in {lock}"
    pid, node, started, command = (
        "".join(c if c.isprintable() else "?" for c in text)[:_SHOWN_CHARACTERS] for text in told
    )
    return f"process {pid} on {node}, started {started}: {command}"


def _is_at(lock: Path, number: int) -> bool:
    """Return whether the open file is the one at that path."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(number))
    except FileNotFoundError:
        return False


def _give_up(held: _Held) -> None:
    with contextlib.suppress(OSError):  # the folder may have gone; the lock goes in any case
        if _is_at(held.lock, held.number):
            shutil.rmtree(held.lock.with_name(UNFINISHED), ignore_errors=True)
            held.lock.unlink()
    os.close(held.number)
    for folder in reversed(held.made):
        with contextlib.suppress(OSError):  # it has got something, or is gone
            folder.rmdir()


def _forget() -> None:
    """Let a forked process hold nothing: a lock lasts as long as any copy of its file is open."""
    for held in _held.values():
        os.close(held.number)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
