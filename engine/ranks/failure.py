"""How a rank that fails ends the others, which wait for it in a collective.

They would until its timeout, or until the scheduler notices: minutes of all GPUs. A rank that fails
says so through the store in which the ranks met. A thread of every rank listens there, and ends its
process wherever the others are, in a collective on the GPU too. A rank that is killed says nothing:
torchrun and srun see it.
"""

import atexit
import contextlib
import datetime
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch.distributed as dist

from engine.environment import tell_torchrun
from engine.printable import say

_KEY = "failure/said"
_PAUSE = 1.0  # seconds between two looks for it; our choice: 1,024 ranks look as often a second
_HEARD = datetime.timedelta(seconds=10)  # for all ranks to hear of something; our choice


@dataclass
class _World:
    """The ranks that this process is one of."""

    rank: int
    size: int
    store: Any  # mypy's torch knows no Store.clone: a connection for each thread
    has_parted: threading.Event = field(default_factory=threading.Event)
    is_counted: threading.Lock = field(default_factory=threading.Lock)
    """Held once this rank is among those that have heard."""
    listener: threading.Thread | None = None


_world: _World | None = None


def listen() -> None:
    """End this process when another rank says that it has failed; called once ranks have joined."""
    global _world
    store: Any = dist.distributed_c10d._get_default_store()
    _world = _World(dist.get_rank(), dist.get_world_size(), store.clone())
    _world.listener = threading.Thread(target=_hear, args=(_world, store.clone()), daemon=True)
    _world.listener.start()
    atexit.register(part)


def part() -> None:
    """Listen no more: this process leaves the others in order. The first rank tells them, since the
    store may go with it, of which torch would warn."""
    global _world
    world, _world = _world, None
    if world is not None:
        world.has_parted.set()
        if world.rank == 0:
            _say(world, {"rank": 0})
        else:
            _count(world, world.store)
        # A thread that is still in torch's code when Python ends would abort the process.
        if world.listener is not None:
            world.listener.join(_HEARD.total_seconds())  # no longer, should a store not answer


def wait_for_end() -> None:
    """Wait a while for the first rank, which has failed, to end this process; return where nobody
    listens, or it says nothing."""
    if _world is not None:
        time.sleep(_HEARD.total_seconds())


def tell_others(message: str, status: int, text: str = "") -> None:
    """End this process with `status`, and all ranks of its world; returns where it is alone.

    Only the first rank to fail is heard, with a line that rank 0 prints; the text is for the rank's
    own stderr.
    """
    if _world is None:
        return
    if text:
        say(text, stream=sys.stderr)
    _say(_world, {"rank": _world.rank, "message": message, "status": status})
    _end(status)


def _say(world: _World, words: dict[str, Any]) -> None:
    """Say something to all ranks, where none has before, and wait until they have heard it."""
    with contextlib.suppress(dist.DistError):  # the store is gone, and rank 0 with it
        world.store.compare_set(_KEY, "", json.dumps(words))
        world.store.wait([f"{_KEY}/heard"], _HEARD)
        world.store.set(f"{_KEY}/over", "")


def _count(world: _World, store: Any) -> None:
    """Have this rank counted among those that have heard, or need not: once."""
    with contextlib.suppress(dist.DistError):
        if world.is_counted.acquire(blocking=False) and (
            store.add(f"{_KEY}/readers", 1) == world.size - 1
        ):
            store.set(f"{_KEY}/heard", "")


def _hear(world: _World, store: Any) -> None:
    try:
        # A look at a time: nobody could end a wait when this process parts.
        while not store.check([_KEY]):
            if world.has_parted.wait(_PAUSE):
                return
        words = json.loads(store.get(_KEY))
        if words["rank"] == world.rank:
            return
        _count(world, store)
        if world.rank == 0:  # the store goes with it
            store.wait([f"{_KEY}/over"], _HEARD)
    except dist.DistError:  # rank 0 was killed
        return
    if "status" in words and not world.has_parted.is_set():
        message = f"rank {words['rank']} failed: {words['message']}"
        if world.rank == 0:  # whose output is read first: under srun each rank has a file
            say(message, stream=sys.stderr)
        tell_torchrun(message)
        _end(words["status"])


def _end(status: int) -> NoReturn:
    """End the process now: in order it would wait for the ranks of its groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
