"""Runs steps until a budget of seconds is spent: a process and a limit a step, results on disk at
once.

A step that hangs, dies or is killed by an illegal access costs itself alone. What a step prints
goes line by line into log.txt, what became of it into steps.jsonl as soon as it ends. So whoever
kills this process finds all that was known until then.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from benchmarks.records import append_line

LEAST_SECONDS = 8.0
"""With less left no step is begun: most of it would go into importing torch."""
_TAIL_LINES = 40
_LINE_LENGTH = 2000
_LOG_CHARACTERS = 4_000_000
"""Of a step; it is a log to be read."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

Status = Literal["done", "failed", "died", "hung", "cut short", "not reached"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of the plan."""

    name: str
    command: tuple[str, ...]
    """Arguments of the Python interpreter."""
    limit: float
    """Seconds after which it counts as hung."""
    is_timed: bool = True
    """It measures time and has the device to itself; others run side by side."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step."""

    step: str
    status: Status
    """done: exit status 0; failed: another; died: by a signal; hung: at its limit; cut short: the
    budget ended before its limit."""
    seconds: float = 0.0
    returncode: int | None = None
    tail: list[str] = field(default_factory=list)
    """The last lines it printed, where it was not done."""


class Spending:
    """Runs steps one after the other, untimed ones side by side, and writes what becomes of them.

    Use it as a context manager: at its end, an exception or a signal included, no step is left
    running.
    """

    def __init__(
        self,
        out: Path,
        *,
        budget: float,
        side_by_side: int,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.side_by_side = side_by_side
        self.environment = dict(environment or {})
        self.say = say
        self._end = time.monotonic() + budget
        self._lock = threading.Lock()
        self._log: IO[str] = (out / "log.txt").open("a", encoding="utf-8")
        self._running: set[subprocess.Popen] = set()
        self._is_over = False

    def __enter__(self) -> "Spending":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._log.close()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._end - time.monotonic()

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run steps in their order; neighbours that time nothing run beside each other."""
        outcomes: list[Outcome] = []
        for group in grouped(steps):
            with ThreadPoolExecutor(min(len(group), self.side_by_side)) as pool:
                try:
                    outcomes += pool.map(self._run_one, group)
                except BaseException:  # a signal: the pool would wait for its steps
                    self._stop()
                    raise
        return outcomes

    def _stop(self) -> None:
        self._is_over = True
        with self._lock:
            running = list(self._running)
        for process in running:
            kill(process)

    def _run_one(self, step: Step) -> Outcome:
        if self._is_over or self.left < LEAST_SECONDS:
            outcome = Outcome(step=step.name, status="not reached")
        else:
            outcome = self._run_process(step)
        with self._lock:
            append_line(self.out / "steps.jsonl", json.dumps(asdict(outcome)))
            self.say(f"{outcome.step}: {outcome.status}, {outcome.seconds:.0f} s")
        return outcome

    def _run_process(self, step: Step) -> Outcome:
        start = time.monotonic()
        left = self.left
        process = subprocess.Popen(
            [sys.executable, "-u", *step.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **self.environment},
            start_new_session=True,  # so that what it starts can be killed with it
            preexec_fn=_die_with_parent,
        )
        with self._lock:
            self._running.add(process)
            if self._is_over:  # since it was asked for
                kill(process)
        tail: list[str] = []
        reader = threading.Thread(target=self._read, args=(step.name, process, tail), daemon=True)
        reader.start()
        is_over = False
        try:
            process.wait(timeout=min(step.limit, left))
        except subprocess.TimeoutExpired:
            is_over = True
        kill(process)  # what it started, too
        reader.join(timeout=5)
        with self._lock:
            self._running.discard(process)
        code = process.poll()
        status: Status = "done" if code == 0 else "failed"
        if is_over:
            status = "hung" if step.limit <= left else "cut short"
        elif code is None or code < 0:
            status = "died"
        return Outcome(
            step=step.name,
            status=status,
            seconds=round(time.monotonic() - start, 1),
            returncode=code,
            tail=[] if status == "done" else tail[-_TAIL_LINES:],
        )

    def _read(self, name: str, process: subprocess.Popen, tail: list[str]) -> None:
        assert process.stdout is not None
        num_logged = 0
        for line in process.stdout:
            tail.append(line.rstrip("\n")[:_LINE_LENGTH])
            del tail[: -2 * _TAIL_LINES]
            num_logged += len(line)
            # A full disk loses the log; the step goes on, whose output somebody has to read.
            with self._lock, contextlib.suppress(OSError):
                if num_logged < _LOG_CHARACTERS and not self._log.closed:
                    self._log.write(f"[{name}] {line.rstrip()}\n")
                    self._log.flush()


def grouped(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Yield timed steps alone, and neighbours that time nothing together."""
    group: list[Step] = []
    for step in steps:
        if step.is_timed:
            if group:
                yield group
            yield [step]
            group = []
        else:
            group.append(step)
    if group:
        yield group


def kill(process: subprocess.Popen) -> None:
    """End a step and all that it started; wait at most five seconds for it.

    A process within the driver ends when the driver lets it: it is not waited for.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def _die_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
