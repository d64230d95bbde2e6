"""How far a work of many seconds is: a bar on a terminal; elsewhere, as in a log, a line now and
then.

Training says a line a step by itself (engine/metrics.py); this is for what has no steps.
"""

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from engine.printable import open_console, printable

SECONDS_A_LINE = 4.0
"""Between two lines of a log: our choice, so that it is never silent for 5."""
_LINE_CHARACTERS = 1000  # the most that one has; our choice


class LongWork:
    """`with LongWork("label", is_writer=True, total=900) as work: ... work.advance()`.

    Says at once what begins, and from then on, by a thread of its own, how far it is: also within
    one long call, and where nobody counts. Only the writing rank has a voice.
    """

    def __init__(
        self,
        title: str,
        *,
        is_writer: bool,
        total: int | None = None,
        console: Console | None = None,
    ) -> None:
        """total: how often advance() will be called; None where that is not known."""
        self._title = title
        self._is_writer = is_writer
        self._total = total
        self._console = console or open_console()
        self._done = 0
        self._reached = 0.0  # seconds after the start
        self._now = ""
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._has_ended = threading.Event()
        self._voice = threading.Thread(target=self._speak, daemon=True)

    def advance(self, now: str = "") -> None:
        """Count one part as done; `now` names the one that begins."""
        self._done += 1
        self._reached = time.monotonic() - self._start
        self.tell(now)

    def tell(self, now: str) -> None:
        """Name what is done now, without counting."""
        self._now = now
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._done,
                description=_shown(f"{self._title}  {now}".rstrip()),
            )

    def __enter__(self) -> "LongWork":
        if self._is_writer:
            self._start = time.monotonic()
            if self._console.is_terminal:
                self._bar = _started_bar(self._console, _shown(self._title), self._total)
            else:
                self._say(self._title)
                self._voice.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._has_ended.set()
        if self._bar:
            self._bar.stop()
        if self._voice.is_alive():
            self._voice.join()

    def _speak(self) -> None:
        while not self._has_ended.wait(SECONDS_A_LINE):
            self._say(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        if self._total is None or not self._done:
            return f"{self._title}  {self._now}  after {seconds:.0f} s"
        # All take as long as those that are done, the last of which ended at _reached.
        left = max(0.0, self._reached * self._total / self._done - seconds)
        eta = f"{int(left) // 60}:{int(left) % 60:02d}"
        return f"{self._title} {self._done}/{self._total}  {self._now}  eta {eta}"

    def _say(self, line: str) -> None:
        self._console.print(Text(_shown(line)), soft_wrap=True)


def _shown(line: str) -> str:
    return printable(line, limit=_LINE_CHARACTERS, one_line=True)


def _started_bar(console: Console, title: str, total: int | None) -> Progress:
    counts = () if total is None else (BarColumn(), MofNCompleteColumn())
    columns = (TextColumn("{task.description}", markup=False), *counts, TimeElapsedColumn())
    bar = Progress(*columns, console=console, refresh_per_second=2)
    bar.add_task(title, total=total)
    bar.start()
    return bar
