"""Whether a signal has asked this process to stop. Imports neither torch nor megatron.

    @stage()  # engine/run.py: noting_signals() and more
    def train(config):
        run = start_run(...)  # leaves here where a signal came meanwhile
        ...
        run.leave_if_asked()
        for step in ...:
            ...
            boundary = checkpointer.boundary(step + 1, is_last=...)
            if boundary.saves:
                checkpointer.save(...)
            if boundary.leaves:
                checkpointer.finish()
                run.leave(step + 1)

A rank that a signal ended at once would leave the others waiting for it. So a signal is noted, and
all ranks leave together at the next boundary (engine/checkpoints/checkpointer.py). Slurm sends
SIGUSR1 before a job's time limit (recipes/slurm/*.sbatch ask for it) and SIGTERM when it preempts
or cancels a job; torchrun passes SIGTERM, SIGINT and SIGHUP on. A terminal sends SIGINT at Ctrl-C
and SIGHUP when it closes, and the system SIGXCPU at a limit of computing. Who presses Ctrl-C again
wants the end at once, and gets it.
"""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from engine.printable import say

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h, try again: recipes/slurm/launch.sh requeues a job that ends with
it."""
INTERRUPTED = 130
"""Of a process that Ctrl-C has ended at once, as shells have it."""

# What starts a program in the background (nohup, a shell's &) has it ignore these.
_IGNORABLE = (signal.SIGINT, signal.SIGHUP)
# Seconds within which two are one: `timeout` sends its signal to a process and to its group. Our
# choice, sooner than anyone presses Ctrl-C again.
_ONE = 0.2
_is_noted = False
_num_blocks = 0  # that handle signals now
_ends_at_second = True


@contextlib.contextmanager
def noting_signals() -> Iterator[None]:
    """Note the signals that ask a run to stop, in this block, instead of dying of them.

    Blocks nest, and what one has noted the next inner one knows. A second Ctrl-C ends the process.
    Also a decorator.
    """
    with _handling(_note):
        yield


@contextlib.contextmanager
def leaving_at_signals(leave_together: Callable[[str, int], object]) -> Iterator[None]:
    """Leave at such a signal wherever this block is, but in an inner one that notes them; what the
    block has done stays, and the same command goes on.

    leave_together: ends the other ranks with a line and a status, and this process; where there are
    no others it returns. What an inner block noted too late to act on is acted on at its end.
    """

    def leave_now(number: int, frame: FrameType | None) -> None:
        _note(number, frame)
        leave_together(_line(), EXIT_STATUS)
        leave()

    with _handling(leave_now):
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in this block, each time, whatever is around it."""
    global _ends_at_second
    before, ends = signal.signal(signal.SIGINT, signal.default_int_handler), _ends_at_second
    _ends_at_second = False
    try:
        yield
    finally:
        _ends_at_second = ends
        signal.signal(signal.SIGINT, before)


def is_noted() -> bool:
    """Return whether a signal has reached this process in the block that notes them."""
    return _is_noted


def ask() -> None:
    """Ask this process to stop, as a signal would, where it notes them."""
    global _is_noted
    _is_noted = True


def leave(when: str = "", *, is_writer: bool = True) -> NoReturn:
    """End the process with EXIT_STATUS; the writer says when."""
    if is_writer:
        say(_line(when))
    raise SystemExit(EXIT_STATUS)


def end_interrupted() -> NoReturn:
    """End the process now, of Ctrl-C: nothing is finished, nothing is said."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stdout, or nobody there
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a progress bar had hidden the cursor
    os._exit(INTERRUPTED)


def _line(when: str = "") -> str:
    return " ".join(("stopped by a signal", when)).strip() + "; the same command continues"


def _note(number: int, frame: FrameType | None) -> None:
    ask()
    if number == signal.SIGXCPU:  # which would come again every second, up to the hard limit
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a function handle the signals in this block, but for those that are to be ignored."""
    global _is_noted, _num_blocks
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if not (number in _IGNORABLE and before[number] is signal.SIG_IGN):
            signal.signal(number, handler)
    is_outermost = _num_blocks == 0
    _num_blocks += 1
    try:
        with _counting_interrupts() if is_outermost else contextlib.nullcontext():
            yield
    finally:
        _num_blocks -= 1
        for number, previous in before.items():
            signal.signal(number, previous)
        if is_outermost:
            _is_noted = False
    outer = before[signal.SIGTERM]
    if _is_noted and callable(outer):
        outer(signal.SIGTERM, None)


@contextlib.contextmanager
def _counting_interrupts() -> Iterator[None]:
    """Have a thread see every Ctrl-C: Python's handlers wait until the main one is back from torch,
    which may be minutes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_count_interrupts, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")  # no signal has this number
        thread.join()
        os.close(writer)
        os.close(reader)


def _count_interrupts(reader: int) -> None:
    first: float | None = None
    while True:
        for number in os.read(reader, 512):
            if number == 0:
                return
            if number != signal.SIGINT or not _ends_at_second:
                continue
            if first is None:
                first = time.monotonic()
                _promise()
            elif time.monotonic() - first > _ONE:
                end_interrupted()


def _promise() -> None:
    """Tell who has pressed Ctrl-C what will happen: where that is at this process's own terminal,
    for a rank of several has none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        is_mine = os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
        if is_mine and signal.getsignal(signal.SIGINT) is _note:
            say("stopping at the end of this step; Ctrl-C again ends at once", stream=sys.stderr)


def pass_over_interrupts(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print what ends the process, but nothing of Ctrl-C: Python ends it as that asks."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # while a recipe is imported; engine/recipe.py has its own
    sys.excepthook = pass_over_interrupts
