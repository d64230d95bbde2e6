"""Providers as processes that run an iteration when it is their turn (ppo_provider.py).

Only one of them works at a time, the others wait for a line. Where all fit into memory together
they take turns, iteration by iteration, so that a drift of the machine meets all of them alike.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.ppo_job import GoesOn, Iterations
from benchmarks.provider_process import ProviderError, ProviderProcess, Say

Opening = Callable[[], "Provider"]
"""Starts a provider's process."""


class Provider:
    """One provider, from its start to its record."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], say: Say
    ) -> None:
        self.name = name
        self.iterations: Iterations = []
        self.record: dict[str, Any] = {}
        self._say = say
        self._since = time.monotonic()
        self._process = ProviderProcess(name, command, environment, say)
        self.close = self._process.close

    def start(self) -> None:
        """Wait until it could begin with its first iteration; raises ProviderError."""
        self._process.hear("starting")
        self._say(f"{self.name}: ready after {time.monotonic() - self._since:.0f} s")

    def iterate(self) -> None:
        """Let it run one iteration; raises ProviderError."""
        number = len(self.iterations)
        self._process.tell("go")
        self.iterations = self._process.hear(f"iteration {number}")["iterations"]
        phases = self.iterations[-1]
        parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        warm_up = "" if number else ", not counted"
        self._say(
            f"{self.name}: iteration {number}, {sum(phases.values()):.2f} s ({parts}){warm_up}"
        )

    def finish(self) -> None:
        """Have its record; raises ProviderError."""
        self._process.tell("stop")
        self.record = self._process.hear("writing its record")["record"]


def run_in_turns(
    openings: Sequence[Opening], goes_on: GoesOn, say: Say, *, one_by_one: bool
) -> Iterator[dict[str, Any]]:
    """Yield the record of every provider that has one, in order; what another died of is said.

    one_by_one: each ends before the next begins, and has the memory to itself.
    """
    groups = [[opening] for opening in openings] if one_by_one else [list(openings)]
    for group in groups:
        with contextlib.ExitStack() as stack:
            opened = [opening() for opening in group]  # libraries load side by side: untimed
            for provider in opened:
                stack.callback(provider.close)
            alive = [provider for provider in opened if _lives(provider.start, say)]
            while going := [provider for provider in alive if goes_on(provider.iterations)]:
                dead = [provider for provider in going if not _lives(provider.iterate, say)]
                alive = [provider for provider in alive if provider not in dead]
            for provider in alive:
                if _lives(provider.finish, say):
                    yield provider.record


def _lives(call: Callable[[], None], say: Say) -> bool:
    """Call; return whether the provider has survived it."""
    try:
        call()
    except ProviderError as error:
        say(str(error))
        return False
    return True
