"""A provider's process: it gets its turn by a line, and answers by a line of JSON."""

import contextlib
import json
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.rivals import ROOT

SILENCE = 5.0
"""Seconds after which a process that has said nothing is reported to be still at work."""
_NUM_LAST_LINES = 8
_LINE_LENGTH = 300

Say = Callable[[str], object]


class ProviderError(RuntimeError):
    """A provider's process ended without its answer; the message has its last lines."""


class ProviderProcess:
    """One process, from its start to its end."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], say: Say
    ) -> None:
        self.name = name
        self.say = say
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

    def tell(self, word: str) -> None:
        """Give it its turn."""
        with contextlib.suppress(BrokenPipeError):  # what it died of, it is asked next
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def hear(self, what: str) -> dict[str, Any]:
        """Return its next answer; says now and then that it is waited for, while it does `what`.
        Raises ProviderError."""
        since = time.monotonic()
        while not select.select([self._process.stdout], [], [], SILENCE)[0]:
            self.say(f"{self.name}: {what}, {time.monotonic() - since:.0f} s")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise ProviderError(self._last_words())
        return json.loads(line)

    def close(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.poll() is None and not self._has_ended(seconds=1.0):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

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
