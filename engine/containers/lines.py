"""The lines of a file of text, plain or packed."""

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.containers.packed import open_content
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH

MAX_LINE_BYTES = 16 << 20
"""Of a line or record that is read whole. Our choice: several times the longest book, and what a
tokenizer makes of it (150 bytes a byte, measured) fits a small machine."""
MAX_EMPTY_BYTES = 4 << 20
"""By which empty lines may outweigh all others; our choice: seconds."""
_LINES_A_SHARE = 64  # between two times that a share is told


def read_lines(
    path: Path,
    reached: Callable[[float], object] = lambda share: None,
    *,
    part_bytes: int | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of a plain or packed file; raises UserError.

    `reached` is told now and then which share of the file has been read. A line over
    MAX_LINE_BYTES is an error; with part_bytes it comes in parts of so many bytes, each with the
    line's number. Errors are also what only takes time: empty lines that outweigh the others by
    megabytes, and packed data that expand as no text does.
    """
    name = named(path, MAX_SHOWN_PATH)
    number, num_empty, num_other = 0, 0, 0
    limit = part_bytes or MAX_LINE_BYTES + 1
    with open_content(path, lambda: f"line {number}") as content:
        stream = content.stream
        ends_line = True
        while line := stream.readline(limit):
            number += ends_line
            ends_line = line.endswith(b"\n")
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{name}:{number}: a line of over {MAX_LINE_BYTES} bytes")
            if not line.isspace():
                num_other += len(line)
            elif (num_empty := num_empty + len(line)) > num_other + MAX_EMPTY_BYTES:
                raise UserError(f"{name}:{number}: {num_empty} bytes to here are empty lines")
            if part_bytes or number % _LINES_A_SHARE == 0:
                reached(content.share())
            yield number, line
        reached(1.0)
