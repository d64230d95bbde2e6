"""What the first rank finds out for all: most of all, what lies on a shared file system."""

import contextlib
import datetime
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from engine.errors import UserError
from engine.ranks import failure
from engine.ranks.signs import in_phase

_LONGEST_WAIT = datetime.timedelta(days=7)
_said = itertools.count()  # what the first rank has said so far, the same number on every rank


def said_by_first_rank(say: Callable[[], str]) -> str:
    """Return what `say` returns on rank 0, where alone it is called; all ranks call together.

    So is whatever one looks up on a file system, which may show each rank another state. The others
    wait through the store, and as long as it takes: a collective that waits ends the run after its
    timeout. A UserError on rank 0 is raised on all, another exception is a RuntimeError there.
    Where rank 0 leaves (a signal has asked it to), all leave. A process that has joined no ranks is
    its own first.
    """
    if not dist.is_initialized():
        return say()
    key = f"said_by_first_rank/{next(_said)}"
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() > 0:
        with in_phase("waiting for the first rank", is_bounded=False):
            store.wait([key], _LONGEST_WAIT)
        answer = json.loads(store.get(key))
        if store.add(f"{key}/readers", 1) == dist.get_world_size() - 1:
            store.set(f"{key}/read", "")
        if "error" in answer:
            raise UserError(answer["error"])
        if "failure" in answer:
            failure.wait_for_end()  # whose error on screen shall be rank 0's own
            raise RuntimeError(f"rank 0 failed: {answer['failure']}")
        if "status" in answer:
            raise SystemExit(answer["status"])
        return answer["text"]
    try:
        with in_phase("what the first rank does for all", is_bounded=False):
            text = say()
    except UserError as error:
        _say_and_go(store, key, {"error": str(error)})
        raise
    except SystemExit as leaving:
        _say_and_go(store, key, {"status": leaving.code})
        raise
    except BaseException as error:
        _say_and_go(store, key, {"failure": repr(error)})
        raise
    store.set(key, json.dumps({"text": text}))
    return text


def _say_and_go(store: dist.Store, key: str, answer: dict[str, Any]) -> None:
    """Set an answer and wait until all have read it: the store may go with this process."""
    store.set(key, json.dumps(answer))
    if dist.get_world_size() > 1:
        with contextlib.suppress(dist.DistStoreError):  # a rank is lost
            store.wait([f"{key}/read"], datetime.timedelta(minutes=1))
