"""Providers as processes that run an iteration when it is their turn (ppo_provider.py).

Only one of them works at a time, the others wait for a line. Where all fit into memory together
they take turns, iteration by iteration, so that a drift of the machine meets all of them alike.
"""

import contextlib
import json
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.ppo_job import GoesOn, Iterations
from benchmarks.rivals import ROOT

SILENCE = 5.0
"""Seconds after which a process that has said nothing is reported to be still at work."""
_NUM_LAST_LINES = 8
_LINE_LENGTH = 300

Say = Callable[[str], object]
Opening = Callable[[], "Provider"]
"""Starts a provider's process."""


class ProviderError(RuntimeError):
    """A provider's process ended without its record; the message has its last lines."""


class Provider:
    """One process, from its start to its record."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], say: Say
    ) -> None:
        self.name = name
        self.iterations: Iterations = []
        self.record: dict[str, Any] = {}
        self._say = say
        self._since = time.monotonic()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - close() does
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(environment),
            cwd=ROOT,
        )

    def start(self) -> None:
        """Wait until it could begin with its first iteration; raises ProviderError."""
        self._hear("starting")
        self._say(f"{self.name}: ready after {time.monotonic() - self._since:.0f} s")

    def iterate(self) -> None:
        """Let it run one iteration; raises ProviderError."""
        number = len(self.iterations)
        self._tell("go")
        self.iterations = self._hear(f"iteration {number}")["iterations"]
        phases = self.iterations[-1]
        parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        warm_up = "" if number else ", not counted"
        self._say(
            f"{self.name}: iteration {number}, {sum(phases.values()):.2f} s ({parts}){warm_up}"
        )

    def finish(self) -> None:
        """Have its record; raises ProviderError."""
        self._tell("stop")
        self.record = self._hear("writing its record")["record"]

    def close(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.poll() is None and not self._has_ended(seconds=1.0):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _tell(self, word: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # what it died of, it is asked next
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def _hear(self, what: str) -> dict[str, Any]:
        """Return its next message; says now and then that it is waited for."""
        since = time.monotonic()
        while not select.select([self._process.stdout], [], [], SILENCE)[0]:
            self._say(f"{self.name}: {what}, {time.monotonic() - since:.0f} s")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise ProviderError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        status = self._process.wait()
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self._errors.seek(0)
        lines = [line.rstrip()[:_LINE_LENGTH] for line in self._errors if line.strip()]
        return "\n".join([f"{self.name} ended with {how}", *lines[-_NUM_LAST_LINES:]])

    def _has_ended(self, *, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None


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
