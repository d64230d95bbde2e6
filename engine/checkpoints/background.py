"""One piece of work at a time on a thread of its own, while this process computes.

A thread, not a process: it dies with the one that it works for, and shares its memory. Writing and
checksums leave Python's lock to the others.
"""

import threading
from collections.abc import Callable


class Background:
    """Where the work runs; what it raises is raised by whoever waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Wait for the work before, and begin this."""
        self.wait()
        # A daemon: where another rank is gone it may wait for ever, and must not hold the process.
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the work has ended with an error that nobody has been told of."""
        return self._error is not None

    def is_over(self, seconds: float) -> bool:
        """Return whether the work has ended, well or not, after waiting so long at most."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the work, for that long where a time is given; return whether it is done.

        Raises what it raised, once.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
