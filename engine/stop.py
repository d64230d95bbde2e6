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
or cancels a job; torchrun passes SIGTERM on.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from engine.printable import say

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h, try again: recipes/slurm/launch.sh requeues a job that ends with
it."""

_is_noted = False


@contextlib.contextmanager
def noting_signals() -> Iterator[None]:
    """Note the signals that ask a run to stop, in this block, instead of dying of them.

    Blocks nest, and what one has noted the next inner one knows. Also a decorator.
    """
    global _is_noted
    previous = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if _note not in previous.values():
            _is_noted = False


def is_noted() -> bool:
    """Return whether a signal has reached this process in the block that notes them."""
    return _is_noted


def leave(when: str, *, is_writer: bool = True) -> NoReturn:
    """End the process with EXIT_STATUS; the writer says when."""
    if is_writer:
        say(f"stopped by a signal {when}; the same command continues")
    raise SystemExit(EXIT_STATUS)


def _note(number: int, frame: FrameType | None) -> None:
    global _is_noted
    _is_noted = True
