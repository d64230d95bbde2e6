"""What the first rank decides on from what every rank tells it, through the store.

It is no collective: a thread of each rank may take part while the ranks compute. A rank that comes
late is waited for, however long it takes.
"""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from engine.environment import attempt_of_environment
from engine.errors import UserError

_PAUSES = (0.001, 0.1)  # seconds between two looks, at first and at last; our choice
_LAST_WAIT = 60.0  # seconds for the others to learn of an error; our choice
_num_councils = itertools.count()  # made so far, the same number on every rank


class Council:
    """The ranks of this process's world, in one matter: each decision is made by all, in order.

    All make it together. A process that has joined no ranks is alone.
    """

    def __init__(self) -> None:
        self._matter = f"{attempt_of_environment()}/{next(_num_councils)}"
        self._num_decided = 0
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        # A connection of its own, for a thread of its own.
        store: Any = None if is_alone else dist.distributed_c10d._get_default_store()
        self._store: Any = None if is_alone else store.clone()

    def decide(self, told: str, decide: Callable[[list[str]], str]) -> str:
        """Tell the first rank a text and return what `decide` makes of those of all, in their
        order; it is called on rank 0 alone.

        A UserError that it raises is raised on all ranks; another exception is a RuntimeError on
        the others.
        """
        if self._store is None:
            return decide([told])
        key = f"council/{self._matter}/{self._num_decided}"
        self._num_decided += 1
        if dist.get_rank() > 0:
            self._store.set(f"{key}/{dist.get_rank()}", told)
            return self._learn(f"{key}/decided")
        others = [f"{key}/{rank}" for rank in range(1, dist.get_world_size())]
        try:
            decision = decide([told, *(self._await(other) for other in others)])
        except UserError as error:
            self._say_and_wait(key, {"error": str(error)})
            raise
        except BaseException as error:
            self._say_and_wait(key, {"failure": repr(error)})
            raise
        self._store.set(f"{key}/decided", json.dumps({"decision": decision}))
        for other in others:
            self._store.delete_key(other)
        return decision

    def _say_and_wait(self, key: str, answer: dict[str, str]) -> None:
        """Have the others learn of an error before it ends this process: the store may go too."""
        self._store.set(f"{key}/decided", json.dumps(answer))
        last = time.monotonic() + _LAST_WAIT
        num_others = dist.get_world_size() - 1
        while self._store.add(f"{key}/decided/readers", 0) < num_others:
            if time.monotonic() > last:  # a rank is lost
                return
            time.sleep(_PAUSES[-1] / 10)

    def _learn(self, key: str) -> str:
        answer = json.loads(self._await(key))
        self._store.add(f"{key}/readers", 1)
        if "error" in answer:
            raise UserError(answer["error"])
        if "failure" in answer:
            raise RuntimeError(f"rank 0 failed: {answer['failure']}")
        return answer["decision"]

    def _await(self, key: str) -> str:
        """Return the value of a key once it is there: a look at a time, for nobody could end a wait
        in torch's code."""
        pause, longest = _PAUSES
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return self._store.get(key).decode()
