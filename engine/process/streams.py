"""What becomes of words that nobody can read: a run goes on, whatever its stdout and stderr are.

A reader may go away (`| head -1`), a terminal close, a disk be full. A stream may be closed from
the start (`>&-`), or an encoding lack a character. None of these is a reason to lose a run: from
then on the stream is silent, and the files have what there is to know.
"""

import contextlib
import os
import sys
from typing import Any, TextIO

from engine.printable import accept_any_text


def make_streams_last() -> None:
    """Have this process's stdout and stderr take any text, to the end, readable or not."""
    for number in (1, 2):
        _keep(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _nowhere())
        elif not isinstance(stream, _Lasting):
            accept_any_text(stream)
            setattr(sys, name, _Lasting(stream))


class _Lasting:
    """A stream that writes as long as that is possible, and then nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            self._fall_silent()
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._fall_silent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fall_silent(self) -> None:
        """Lead the stream nowhere, with what it has not written yet: Python would try again, and
        complain, when it ends."""
        with contextlib.suppress(OSError, ValueError):  # it has no file, as in a notebook
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def _keep(number: int) -> None:
    """Have a file's number lead nowhere where it was closed, in programs that are started too: the
    next file that is opened would get it, and what a library prints there."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(nowhere, number, inheritable=True)
            os.close(nowhere)
