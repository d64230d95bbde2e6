"""How the ranks of one launch meet: all of them, started alike, or an error that names those that
did not come or were started otherwise.

torchrun's store outlives the ranks that it starts anew (--max-restarts), and has what those of
before have said; nor do its agents on several nodes count the restarts alike. So each rank
comes with a token of its own. By these the first one tells those that are there which part of the
store is theirs.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
import xxhash

from engine.environment import tell_torchrun
from engine.errors import UserError
from engine.printable import say
from engine.ranks.likeness import differences
from engine.ranks.silence import ranks_named

_PAUSE = 0.2  # seconds between two looks at who has come; our choice
_GRACE = (
    10.0  # seconds after the time is up, for who says so and for a library to return; our choice
)
_DECLINED, _CALLED_OFF = "meeting/declined", "meeting/called off"
"""Where a rank says that it does not come, and where the first one does."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A rank, of how many, where they meet, and how long the first to come waits."""

    rank: int
    world_size: int
    address: str
    seconds: float
    start: str = ""
    """What it was started as (engine/ranks/likeness.py), which must be the same on all ranks."""

    @property
    def digest(self) -> str:
        """Of what the rank was started as."""
        return xxhash.xxh3_64_hexdigest(self.start.encode())

    def declined(self, told: str) -> str:
        """Return in words that a rank said it does not come; told: what it set."""
        rank, why = json.loads(told)
        return f"rank {rank} of {self.world_size} did not come to {self.address}: {why}"

    @property
    def _limit(self) -> str:
        return f"within {self.seconds:g} s (--waiting.join-seconds)"

    def missing(self, came: list[int]) -> str:
        """Return in words who came and who did not."""
        absent = sorted(set(range(self.world_size)) - set(came))
        return (
            f"{ranks_named(absent)} of {self.world_size} did not come to {self.address} "
            f"{self._limit}; {ranks_named(came)} came"
        )

    def unreachable(self, why: str) -> str:
        """Return in words that there is no store to meet at."""
        return (
            f"rank {self.rank} of {self.world_size} found nobody to meet at {self.address} "
            f"{self._limit}: {why}"
        )


def meet(store: dist.Store, arrival: Arrival) -> dist.Store:
    """Return the part of the store that the ranks of this start have to themselves, once all have
    come.

    Raises UserError where not all come, or not all were started alike: on the first rank alone,
    where that is there.
    """
    try:
        name = _gather(store, arrival) if arrival.rank == 0 else _take_part(store, arrival)
    except dist.DistError as error:
        raise UserError(arrival.unreachable(str(error).splitlines()[0])) from None
    return dist.PrefixStore(f"started/{name}", store)


def stay_away(store: dist.Store, arrival: Arrival, why: str) -> None:
    """Tell the ranks that meet that this one does not come, in a line that the first one prints.

    The first one itself waits as long as the arrival says for all others to have heard: the store
    goes with it. Not for ranks that an agent ends, whose store outlives them.
    """
    if arrival.rank > 0:
        store.compare_set(_DECLINED, "", json.dumps([arrival.rank, why]))
        store.add(f"{_CALLED_OFF}/heard", 1)
        return
    store.set(_CALLED_OFF, why)
    last = time.monotonic() + arrival.seconds
    while store.add(f"{_CALLED_OFF}/heard", 0) < arrival.world_size - 1 and time.monotonic() < last:
        time.sleep(_PAUSE)


def _gather(store: dist.Store, arrival: Arrival) -> str:
    """Tell every rank that comes, on the first; return the name of this start."""
    deadline = time.monotonic() + arrival.seconds
    name, told = uuid.uuid4().hex, dict.fromkeys(range(1, arrival.world_size), "")
    absent, unlike, declined = list(told), dict[str, list[int]](), ""
    while absent and time.monotonic() < deadline:
        for rank in absent:
            if store.check([f"meeting/{rank}"]):
                token = store.get(f"meeting/{rank}").decode()
                if token != told[rank]:  # else one of before, or one that has not yet said so
                    told[rank] = token
                    store.set(f"meeting/{token}/part", name)
        there = [rank for rank in absent if store.check([_seat(name, rank)])]
        absent = [rank for rank in absent if rank not in there]
        for start, ranks in _started_otherwise(store, arrival, name, there).items():
            unlike.setdefault(start, []).extend(ranks)
            deadline = min(deadline, time.monotonic() + _GRACE)  # who comes late shall hear of it
        if absent and not declined and store.check([_DECLINED]):
            declined = store.get(_DECLINED).decode()
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(_PAUSE if absent else 0)
    came = [rank for rank in range(arrival.world_size) if rank not in absent]
    message = arrival.missing(came) if absent else ""
    if declined and absent:
        message = arrival.declined(declined)
    if unlike:
        message = differences(arrival.start, unlike)
    store.set(f"meeting/{name}/said", message)
    if message:
        with contextlib.suppress(dist.DistError):  # the store goes with this process
            for rank in came[1:]:
                store.wait([f"meeting/{name}/{rank} goes"], datetime.timedelta(seconds=_GRACE))
        raise UserError(message)
    return name


def _started_otherwise(
    store: dist.Store, arrival: Arrival, name: str, ranks: list[int]
) -> dict[str, list[int]]:
    """Return those of the ranks, which are there, that were started otherwise than the first, by
    what they were started as. One round trip where all are alike."""
    found: dict[str, list[int]] = {}
    if not ranks:
        return found
    seats = store.multi_get([_seat(name, rank) for rank in ranks])
    for rank, seat in zip(ranks, seats, strict=True):
        token, _, digest = seat.decode().partition(" ")
        if digest != arrival.digest:
            key = f"meeting/{token}/start"  # which another version may not set
            start = store.get(key).decode() if store.check([key]) else ""
            found.setdefault(start, []).append(rank)
    return found


def _take_part(store: dist.Store, arrival: Arrival) -> str:
    """Come to the first rank, and wait for the others; return the name of this start."""
    token = uuid.uuid4().hex
    store.set(f"meeting/{token}/start", arrival.start)
    store.set(f"meeting/{arrival.rank}", token)
    name = _await(store, f"meeting/{token}/part", arrival)
    mine = f"{token} {arrival.digest}"
    is_taken = store.compare_set(_seat(name, arrival.rank), "", mine).decode() != mine
    message = _await(store, f"meeting/{name}/said", arrival)
    if message:
        tell_torchrun(f"error: {message}")  # that of this node, which says it nowhere else
        if not is_taken:
            store.set(f"meeting/{name}/{arrival.rank} goes", "")
        raise SystemExit(2)  # the first rank says why
    if is_taken:
        raise UserError(
            f"another process has come to {arrival.address} as rank {arrival.rank} of "
            f"{arrival.world_size}; give each run a MASTER_PORT of its own"
        )
    return name


def _seat(name: str, rank: int) -> str:
    """Return the key under which the one process that is a rank of this start says so."""
    return f"meeting/{name}/{rank} is there"


def _await(store: dist.Store, key: str, arrival: Arrival) -> str:
    """Return what the first rank sets; UserError on all ranks, the lowest before the others, where
    it sets nothing."""
    deadline = time.monotonic() + arrival.seconds + _GRACE  # it may have begun to wait later
    while not store.check([key]):
        if store.check([_CALLED_OFF]):  # by the first rank, which says why
            store.add(f"{_CALLED_OFF}/heard", 1)
            raise SystemExit(2)
        if time.monotonic() > deadline:
            came = [
                rank for rank in range(1, arrival.world_size) if store.check([f"meeting/{rank}"])
            ]
            if arrival.rank != came[0]:
                time.sleep(_GRACE)
            raise UserError(arrival.missing(came))
        time.sleep(_PAUSE)
    return store.get(key).decode()


@contextlib.contextmanager
def ending_where_stuck(arrival: Arrival) -> Iterator[None]:
    """End the process where this block, in which a library may wait without end for whatever
    listens at the port, takes longer than ranks wait."""
    is_over = threading.Event()

    def end() -> None:
        if not is_over.wait(arrival.seconds + _GRACE):
            message = "error: " + arrival.unreachable(
                "what listens there does not answer: no rank, or one that is stopped"
            )
            say(message, stream=sys.stderr)
            tell_torchrun(message)
            os._exit(2)

    threading.Thread(target=end, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
