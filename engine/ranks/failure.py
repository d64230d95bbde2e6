"""How a rank that fails ends the others, which wait for it in a collective.

They would until its timeout, or until the scheduler notices: minutes of all GPUs. A rank that fails
says so through the store in which the ranks met. A thread of every rank listens there, and ends its
process wherever the others are, in a collective on the GPU too.

A rank that is killed or stopped says nothing. So the same threads give signs of life
(engine/ranks/signs.py). Who misses those of another rank (engine/ranks/silence.py) fails in its
place, with every living rank's stacks. Another thread sees that the store answers: the process that
keeps it may be the one that is stopped.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch.distributed as dist

from engine import stop
from engine.environment import is_first_on_node, is_launched, tell_torchrun
from engine.printable import ERROR_CHARACTERS, say
from engine.ranks.signs import Signs, end_where_stuck_for, own_signs, write_stacks
from engine.ranks.silence import BEAT_SECONDS, Watch
from engine.settings.waiting import WaitingConfig

_KEY = "failure/said"
_PAUSE = 1.0  # seconds between two looks for it; our choice: 1,024 ranks look as often a second
_HEARD_SECONDS = 10.0  # for all ranks to hear of something; our choice
_SILENT_SECONDS = 4 * _PAUSE  # the same, where one of them is known to be silent; our choice
_CUT_SECONDS = 3 * BEAT_SECONDS  # of silence, where a connection to some rank broke; our choice
_LATER = 5.0  # seconds that other ranks leave the second one, to speak first; our choice
# What torch says in ranks whose connection to another broke, or that waited for one too long.
_CUT = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL error")


@dataclass(kw_only=True)
class _World:
    """The ranks that this process is one of."""

    rank: int
    size: int
    store: Any  # mypy's torch knows no Store.clone: a connection for each thread
    watch: Watch
    has_parted: threading.Event = field(default_factory=threading.Event)
    is_cut: threading.Event = field(default_factory=threading.Event)
    """Set once a connection to another rank broke: which one is gone?"""
    is_counted: threading.Lock = field(default_factory=threading.Lock)
    """Held once this rank is among those that have heard."""
    answered_at: float = field(default_factory=time.monotonic)
    """When the store last answered the listener."""
    listener: threading.Thread | None = None


_world: _World | None = None


def listen(waiting: WaitingConfig) -> None:
    """End this process when another rank says that it has failed, or no longer gives signs of life;
    called once ranks have joined."""
    global _world
    store: Any = dist.distributed_c10d._get_default_store()
    _world = _World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        store=store.clone(),
        watch=Watch(
            world_size=dist.get_world_size(),
            silence_seconds=waiting.silence_seconds,
            hang_seconds=60 * waiting.hang_minutes if dist.get_rank() == 0 else 0,
        ),
    )
    _world.listener = threading.Thread(target=_hear, args=(_world, store.clone()), daemon=True)
    _world.listener.start()
    threading.Thread(target=_time_store, args=(_world,), daemon=True).start()
    atexit.register(part)


def part() -> None:
    """Listen no more: this process leaves the others in order. The first rank tells them, since the
    store may go with it, of which torch would warn."""
    global _world
    world, _world = _world, None
    if world is not None:
        world.has_parted.set()
        end_where_stuck_for(0)
        if world.rank == 0:
            _say(world, {"rank": 0})
        else:
            _count(world, world.store)
        # A thread that is still in torch's code when Python ends would abort the process.
        if world.listener is not None:
            world.listener.join(_HEARD_SECONDS)  # no longer, should a store not answer


def wait_for_end() -> None:
    """Wait a while for the first rank, which has failed, to end this process; return where nobody
    listens, or it says nothing."""
    if _world is not None:
        time.sleep(_HEARD_SECONDS)


def await_verdict(error: object) -> None:
    """Wait a while for who finds out which rank is gone, where torch's error says only that one is:
    that ends this process. Return for any other error."""
    if _world is None or not isinstance(error, RuntimeError):
        return
    if isinstance(error, dist.DistError) or any(words in str(error) for words in _CUT):
        _world.is_cut.set()
        last = time.monotonic() + _CUT_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < last:
            if stop.is_noted() and is_launched():  # torchrun has seen it, and says so
                if is_first_on_node():
                    say(
                        f"rank {_world.rank} lost its connection to a rank or a launcher that is "
                        f"gone, in {own_signs().where()}, and ends",
                        stream=sys.stderr,
                    )
                _end(stop.EXIT_STATUS)
            time.sleep(_PAUSE / 5)


def tell_others(message: str, status: int, text: str = "") -> None:
    """End this process with `status`, and all ranks of its world; returns where it is alone.

    Only the first rank to speak is heard, with a line that rank 0 prints; the text is for the
    rank's own stderr.
    """
    if _world is None:
        return
    if text:
        say(text, stream=sys.stderr)
    _say(_world, _words(_world, message, status, has_failed=True))
    _end(status)


def leave_all(message: str, status: int) -> None:
    """End this process and all ranks of its world with a line of rank 0's, which no failure is;
    returns where it is alone."""
    world = _world
    if world is None:
        return
    if _is_first(world, _words(world, message, status)):
        if world.rank == 0:
            say(message)
        _wait_until_heard(world)
    else:  # the listener hears of the other's, and ends this process
        time.sleep(_HEARD_SECONDS)
    _end(status)


def _words(
    world: _World,
    message: str,
    status: int,
    *,
    has_failed: bool = False,
    wants_stacks: bool = False,
) -> dict[str, Any]:
    """Return what all ranks hear; has_failed: this rank has, and rank 0 says so; wants_stacks: each
    writes its own, and this rank has said why."""
    words = {"rank": world.rank, "message": message, "status": status}
    return words | {"has_failed": has_failed, "wants_stacks": wants_stacks}


def _say(world: _World, words: dict[str, Any]) -> None:
    """Say something to all ranks, where none has before, and wait until they have heard it."""
    _is_first(world, words)
    _wait_until_heard(world)


def _is_first(world: _World, words: dict[str, Any]) -> bool:
    """Say something to all ranks, where none has before; return whether that is what they hear."""
    with contextlib.suppress(dist.DistError):  # the store is gone, and rank 0 with it
        said = json.dumps(words)
        return world.store.compare_set(_KEY, "", said).decode() == said
    return True


def _wait_until_heard(world: _World, seconds: float = _HEARD_SECONDS) -> None:
    with contextlib.suppress(dist.DistError):  # the store is gone, and rank 0 with it
        _wait_for(f"{_KEY}/heard", world.store, seconds)
        world.store.set(f"{_KEY}/over", "")


def _wait_for(key: str, store: Any, seconds: float) -> None:
    """Wait for a key, a look at a time: where it does not come, torch's own wait complains."""
    last = time.monotonic() + seconds
    while not store.check([key]) and time.monotonic() < last:
        time.sleep(_PAUSE / 20)


def _count(world: _World, store: Any) -> None:
    """Have this rank counted among those that have heard, or need not: once."""
    with contextlib.suppress(dist.DistError):
        if world.is_counted.acquire(blocking=False) and (
            store.add(f"{_KEY}/readers", 1) == world.size - 1
        ):
            store.set(f"{_KEY}/heard", "")


def _hear(world: _World, store: Any) -> None:
    try:
        words = _listen_until_said(world, store)
        if words is None or words["rank"] == world.rank:
            return
        _count(world, store)
        if world.rank == 0:  # the store goes with it
            _wait_for(f"{_KEY}/over", store, _HEARD_SECONDS)
    except dist.DistError:
        # In order, the first rank says before that it goes.
        if not world.has_parted.wait(_HEARD_SECONDS):
            _let_rank_1_speak(world)
            _end_for_all(world, "the ranks' store is gone, and with it the first rank or torchrun")
        return
    if "status" in words and not world.has_parted.is_set():
        failed = f"rank {words['rank']} failed: {words['message']}"
        message = failed if words["has_failed"] else words["message"]
        if words["wants_stacks"]:
            write_stacks(world.rank)
        if world.rank == 0 and not words["wants_stacks"]:  # whose output is read first
            say(message, stream=sys.stderr)
        tell_torchrun(message)
        _end(words["status"])


def _listen_until_said(world: _World, store: Any) -> dict[str, Any] | None:
    """Give and take signs of life until something is said to all, and return that; None where this
    rank has parted."""
    beat, beat_at = 0, -BEAT_SECONDS
    # A look at a time: nobody could end a wait when this process parts.
    while not store.check([_KEY]):
        now = world.answered_at = time.monotonic()
        if now - beat_at >= BEAT_SECONDS:
            beat, beat_at = beat + 1, now
            store.set(f"signs/{world.rank}", f"{beat} {own_signs().text()}")
            end_where_stuck_for(2 * world.watch.silence_seconds)
            _look(world, store, now)
        if world.has_parted.wait(_PAUSE):
            return None
    return json.loads(store.get(_KEY))


def _look(world: _World, store: Any, now: float) -> None:
    """Look at the others' signs of life, and fail where they are missing."""
    ranks = range(world.size) if world.rank == 0 else (0, world.rank)
    told = {rank: "0 " + Signs().text() for rank in ranks}
    there = [rank for rank in ranks if rank in world.watch.given or store.check([f"signs/{rank}"])]
    world.watch.given.update(there)
    if there:
        texts = store.multi_get([f"signs/{rank}" for rank in there])
        told |= {rank: text.decode() for rank, text in zip(there, texts, strict=True)}
    world.watch.hear(told, now)
    is_cut = world.is_cut.is_set()
    verdict = world.watch.verdict(now, _CUT_SECONDS if is_cut else None)
    if verdict is not None and not world.has_parted.is_set():
        _end_for_all(world, verdict)


def _time_store(world: _World) -> None:
    """See that the store answers: the listener waits for it in torch's code."""
    while not world.has_parted.wait(_PAUSE):
        silent = time.monotonic() - world.answered_at
        if silent > world.watch.silence_seconds:
            _let_rank_1_speak(world)
            _end_for_all(
                world,
                f"the ranks' store, which the first rank or torchrun keeps, gave no answer for "
                f"{silent:.0f} s: that process is stopped, or its node out of reach",
                can_tell=False,
            )


def _let_rank_1_speak(world: _World) -> None:
    """Leave a launcher the time to end this rank, where those that live cannot agree on who
    speaks."""
    if world.rank != 1:
        time.sleep(_LATER)


def _end_for_all(world: _World, verdict: str, *, can_tell: bool = True) -> None:
    """End all ranks with why they cannot go on, and each with its stacks; return where another rank
    has said so before."""
    place = write_stacks(world.rank)
    message = (
        f"error: {verdict}. Rank {world.rank} was in {own_signs().where()}. The run ends; the same "
        f"command goes on from its newest checkpoint. Stacks: {place}"
    )
    if can_tell and not _is_first(world, _words(world, message, 1, wants_stacks=True)):
        return
    say(message, stream=sys.stderr, limit=ERROR_CHARACTERS)
    tell_torchrun(message)
    if can_tell:
        _wait_until_heard(world, _SILENT_SECONDS)
    _end(1)


def _end(status: int) -> NoReturn:
    """End the process now: in order it would wait for the ranks of its groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
