"""Signs of life that a rank's main thread gives: the phase it is in, the steps that are done, and
that it comes further.

They are counted here, for nothing; a thread tells the other ranks (engine/ranks/failure.py).
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Signs:
    """What a rank's main thread was last seen at."""

    phase: str = "start"
    step: int | None = None
    """Steps done; none: training has not begun."""
    count: int = 0
    """Signs given so far."""
    is_bounded: bool = False
    """Whether the phase is one of training, in which signs follow one another."""

    def text(self) -> str:
        """Return what another rank is told."""
        return json.dumps([self.phase, self.step, self.count, self.is_bounded])

    def where(self) -> str:
        """Return the phase and the step in words."""
        after = "" if self.step is None else f", after step {self.step}"
        return f"phase {self.phase}{after}"


_mine = Signs()
_folder: Path | None = None
_is_written = threading.Lock()


def signs_of(text: str) -> Signs:
    """Return what a rank has told."""
    phase, step, count, is_bounded = json.loads(text)
    return Signs(phase=phase, step=step, count=count, is_bounded=is_bounded)


def own_signs() -> Signs:
    """Return this process's own, which go on changing."""
    return _mine


def come_further() -> None:
    """Give a sign of life: one more micro-batch, one more step of generation."""
    _mine.count += 1


def reach_step(step: int) -> None:
    """Say how many steps are done: this process trains."""
    _mine.step, _mine.phase, _mine.is_bounded = step, "record", True
    come_further()


def end_training() -> None:
    """Say that this process no longer trains."""
    _mine.phase, _mine.is_bounded = "end", False
    come_further()


@contextlib.contextmanager
def in_phase(name: str, *, is_bounded: bool) -> Iterator[None]:
    """Name the phase that this block is. is_bounded: signs follow one another in it, however much
    there is to do; else it may be silent for hours, as where a large file is read."""
    before = _mine.phase, _mine.is_bounded
    _mine.phase, _mine.is_bounded = name, is_bounded
    come_further()
    try:
        yield
    finally:
        _mine.phase, _mine.is_bounded = before
        come_further()


def keep_stacks_in(folder: Path) -> None:
    """Have stacks be written into a run's folder, as stacks/rank_N.txt."""
    global _folder
    _folder = folder / "stacks"


def write_stacks(rank: int) -> str:
    """Write where each of this process's threads is, once; return where that is to be read.

    faulthandler gives no more than 100 calls of 100 threads, in ASCII that prints.
    """
    place = "on stderr" if _folder is None else f"in {_folder}"
    if not _is_written.acquire(blocking=False):
        return place
    try:
        if _folder is None:
            faulthandler.dump_traceback(file=sys.stderr.fileno(), all_threads=True)
            return place
        _folder.mkdir(exist_ok=True)
        path = _folder / f"rank_{rank}.txt"
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        try:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(number, f"rank {rank}, {_mine.where()}, {when}\n".encode())
            faulthandler.dump_traceback(file=number, all_threads=True)
        finally:
            os.close(number)
    except (OSError, ValueError, AttributeError) as error:
        return f"nowhere: {error}"
    return place


def end_where_stuck_for(seconds: float) -> None:
    """Have the process end, with its stacks on stderr, unless it is called again in time; 0: no
    more.

    Not by a thread of Python's: where code of a library holds its lock, none would run.
    """
    if not seconds:
        faulthandler.cancel_dump_traceback_later()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr.fileno())
