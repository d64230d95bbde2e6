"""Whose child this process is: what ends when its parent does.

A child that works for its parent alone goes with it, by the system's own hand. A rank whose
launcher is killed is another matter: nobody is there to see it fail, or to end the others. It stops
at the next step where it can, and ends in any case.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from engine import stop
from engine.environment import (
    has_store_of_launcher,
    is_first_on_node,
    is_launched,
    world_size_of_environment,
)
from engine.printable import say

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PAUSE = 1.0  # seconds between two looks at the parent; our choice
_WITHOUT_STORE = 20.0  # seconds for ranks that can save nothing together, to say so; our choice
_INIT = Path("/proc/1/cmdline")


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent, whose number that is, ends: at once where
    it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # before the system was told
        os._exit(1)


@contextlib.contextmanager
def watching_launcher(last_seconds: float) -> Iterator[None]:
    """In this block, ask the process to stop when torchrun's or srun's process that has started it
    is gone, and end it `last_seconds` later.

    Started by neither, a process may outlive whoever did.
    """
    if not is_launched():
        yield
        return
    if has_store_of_launcher() and world_size_of_environment() > 1:
        last_seconds = min(last_seconds, _WITHOUT_STORE)
    is_over = threading.Event()
    parent = os.getppid()
    watch = threading.Thread(target=_watch, args=(parent, is_over, last_seconds), daemon=True)
    watch.start()
    try:
        yield
    finally:
        is_over.set()


def _watch(parent: int, is_over: threading.Event, last_seconds: float) -> None:
    while os.getppid() == parent and not _is_adopted(parent):
        if is_over.wait(_PAUSE):
            return
    stop.ask()
    if is_over.wait(last_seconds):
        return
    if is_first_on_node():
        say(
            f"error: the launcher of this node's ranks is gone, and {last_seconds:g} s later they "
            "had come to no checkpoint: they end; the same command goes on from the newest one",
            stream=sys.stderr,
        )
    os._exit(stop.EXIT_STATUS)


def _is_adopted(parent: int) -> bool:
    """Return whether a process whose launcher ended before it looked has become init's child; in a
    container the launcher may be process 1 itself."""
    if parent != 1:
        return False
    try:
        return not any(word in _INIT.read_bytes() for word in (b"torch", b"slurm", b"python"))
    except OSError:
        return False
