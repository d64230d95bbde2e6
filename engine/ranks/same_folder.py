"""Whether what all ranks were given as a run's folder is one folder.

One name may lead to a disk of each node. Ranks would then write their shares of a checkpoint where
nobody joins them, which is found out at the first save. Paths cannot tell: unlike ones may lead to
one shared folder, and equal ones to several. So each rank looks for what the first one has just
written there, its lock (engine/claim.py), which says process, node and second. A lock is there in
any case and goes with its holder, so this leaves nothing behind.
"""

import json
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist

from engine.claim import words_of
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH
from engine.ranks.decision import Council
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.signs import in_phase
from engine.ranks.silence import ranks_named

_DELAY = 60.0  # seconds until a node sees what another wrote: NFS's acdirmax, by default
_PAUSE = 0.2  # seconds between two looks; our choice
_MAX_PLACES = 3  # that are named; our choice


def check_same_folder(folder: Path, lock: Path, option: str) -> None:
    """Raise UserError, on all ranks, where some do not see the lock that the first one holds; all
    call together.

    folder: where they are to write, given by the option. lock: beside it or in it. Where all see
    the lock this takes one look; else as long as file systems of nodes may lag behind.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    written = said_by_first_rank(lambda: words_of(lock))
    last = time.monotonic() + _DELAY
    with in_phase("looking for the folder of the first rank", is_bounded=False):
        while not (there := words_of(lock) == written) and time.monotonic() < last:
            time.sleep(_PAUSE)
        place = f"{named(os.path.abspath(folder), MAX_SHOWN_PATH)} on {socket.gethostname()}"
        Council().decide(json.dumps([there, place]), lambda told: _agreed(told, option))


def _agreed(told: list[str], option: str) -> str:
    """Return "" where all have seen the lock; raises UserError, which names those that have not."""
    places: dict[str, list[int]] = {}
    (_, first), *others = (json.loads(text) for text in told)
    for rank, (there, place) in enumerate(others, start=1):
        if not there:
            places.setdefault(place, []).append(rank)
    if not places:
        return ""
    words = [f"{ranks_named(ranks)}: {place}" for place, ranks in places.items()][:_MAX_PLACES]
    absent = sorted(rank for ranks in places.values() for rank in ranks)
    raise UserError(
        f"--{option} is another folder on {ranks_named(absent)} than on rank 0, which has {first} "
        f"({'; '.join(words)}): what it wrote there they did not see within {_DELAY:g} s; name a "
        "folder that all nodes share"
    )
