"""CSV and TSV: a header line with the fields' names, then a row a line, or over several lines where
a quoted cell has line ends in it."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.containers.json_lines import UTF8_BOM, not_utf8
from engine.containers.lines import MAX_LINE_BYTES, read_lines
from engine.containers.row import BadRecord, RowOrBad
from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH

_MAX_COLUMNS = 4096  # our choice: public sets have up to a hundred


def delimited_rows(
    path: Path,
    reached: Callable[[float], object],
    seen: Callable[[bytes], object],
    *,
    delimiter: str,
) -> Iterator[RowOrBad]:
    """Yield the rows of a file, without the cells that are empty; options and errors as those of
    read_rows. All cells are text; engine/shapes/held_lists.py knows which of them are lists."""
    lines = _Lines(path, reached, seen)
    csv.field_size_limit(MAX_LINE_BYTES)  # the library's own is 128 KiB, for all of a process
    header: list[str] = []
    for cells in _records(lines, delimiter):
        where = f"{lines.name}:{lines.first}"
        if not header and not isinstance(cells, BadRecord):
            header = _checked_header(cells, where, delimiter)
        elif not header:
            raise UserError(f"{where}: {cells}")
        elif isinstance(cells, BadRecord):
            yield where, cells
        else:
            yield where, _row(header, cells)


def _records(lines: "_Lines", delimiter: str) -> Iterator[list[str] | BadRecord]:
    """Yield the cells of each record; behind one that is broken the next line begins another."""
    while True:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield lines.problem or cells
                lines.begin()
            return
        except csv.Error as error:
            if str(error) == "unexpected end of data":  # all that followed is in that cell
                raise UserError(f"{lines.name}:{lines.first}: a quote is never closed") from None
            more = f" (line {lines.number})" if lines.number != lines.first else ""
            yield BadRecord(
                f"not one row of CSV: {error}{more}; a quote within a quoted cell is doubled"
            )
            lines.begin()


class _Lines:
    """The lines of a file as text, counted for the record that they are part of."""

    def __init__(
        self, path: Path, reached: Callable[[float], object], seen: Callable[[bytes], object]
    ) -> None:
        self.name = named(path, MAX_SHOWN_PATH)
        self._lines, self._seen = read_lines(path, reached), seen
        self.number = 0
        """Of the line that was read last."""
        self.first = 0
        """Of the record's first line."""
        self.problem: BadRecord | None = None
        """What is wrong with a line of the record."""
        self._num_bytes = 0

    def begin(self) -> None:
        """Have the next line be the first one of a record."""
        self._num_bytes, self.problem = 0, None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if self.number == 1:
            line = line.removeprefix(UTF8_BOM)
        if not self._num_bytes:
            self.first = self.number
        self._num_bytes += len(line)
        if self._num_bytes > MAX_LINE_BYTES:
            raise UserError(
                f"{self.name}:{self.first}: a row of over {MAX_LINE_BYTES} bytes; is a quote never "
                "closed?"
            )
        self._seen(line)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = self.problem or not_utf8(error.start + 1)
            return line.decode("utf-8", "replace")


def _checked_header(cells: Iterable[str], where: str, delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(header) > _MAX_COLUMNS:
        raise UserError(f"{where}: {len(header)} columns; {_MAX_COLUMNS} are the most that is read")
    if len(header) == 1 and ";" in header[0]:
        raise UserError(
            f"{where}: the header {quoted(header[0])} has semicolons between names; write the file "
            "with commas, or with tabs as .tsv"
        )
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: {count} columns are called {quoted(name)}")
    return header


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRecord:
    if len(cells) != len(header):
        return BadRecord(
            f"{len(cells)} cells under a header of {len(header)}: quote cells with commas in them"
        )
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if cell == "":
            continue
        row[name] = cell
    return row
