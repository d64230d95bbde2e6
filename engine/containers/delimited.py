"""CSV and TSV: a header line with the fields' names, then a row a line, or over several lines where
a quoted cell has line ends in it."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.containers.json_lines import UTF8_BOM, not_utf8
from engine.containers.kinds import DELIMITERS, SAYS_DELIMITER
from engine.containers.lines import MAX_LINE_BYTES, read_lines
from engine.containers.row import BadRecord, RowOrBad
from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH

_MAX_COLUMNS = 4096  # our choice: public sets have up to a hundred
_QUOTED = re.compile(r'"(?:[^"]|"")*+"')
_REST_OF_QUOTED = re.compile(r'(?:[^"]|"")*+"')
_BLANKS = re.compile(" *")


def delimited_rows(
    path: Path,
    reached: Callable[[float], object],
    seen: Callable[[bytes], object],
    *,
    delimiter: str,
) -> Iterator[RowOrBad]:
    """Yield the rows of a file, without the cells that are empty; options and errors as those of
    read_rows. All cells are text; engine/shapes/held_lists.py knows which of them are lists."""
    lines = _Lines(path, reached, seen, delimiter)
    csv.field_size_limit(MAX_LINE_BYTES)  # the library's own is 128 KiB, for all of a process
    header: list[str] = []
    for cells in _records(lines, delimiter):
        where = f"{lines.name}:{lines.first}"
        if not header and not isinstance(cells, BadRecord):
            if lines.first > 1 or not SAYS_DELIMITER.fullmatch(delimiter.join(cells)):
                header = _checked_header(cells, where)
        elif not header:
            raise UserError(f"{where}: {cells}")
        elif isinstance(cells, BadRecord):
            yield where, cells
        else:
            yield where, _row(header, cells, delimiter)


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
                raise UserError(
                    f"{lines.name}:{lines.opened}: a quote that begins a cell here is never closed;"
                    " a text that begins with one is quoted, and its own quotes doubled"
                ) from None
            yield BadRecord(_problem(str(error), lines))
            lines.begin()


def _problem(error: str, lines: "_Lines") -> str:
    """Return what is wrong with a record, where the library has said it in its words."""
    if error.startswith("new-line character"):
        return "a carriage return in a cell without quotes: quote the cell"
    more = ""
    if lines.number != lines.first:
        more = f" (line {lines.number}; the quote in line {lines.opened} may lack its end)"
    return f"not one row of CSV: {error}{more}; a quote within a quoted cell is doubled"


class _Lines:
    """The lines of a file as text, counted for the record that they are part of, with quotes as the
    library takes them."""

    def __init__(
        self,
        path: Path,
        reached: Callable[[float], object],
        seen: Callable[[bytes], object],
        delimiter: str,
    ) -> None:
        self.name = named(path, MAX_SHOWN_PATH)
        self._lines, self._seen = _parted(read_lines(path, reached)), seen
        self._delimiter = delimiter
        self.number = 0
        """Of the line that was read last."""
        self.first = 0
        """Of the record's first line."""
        self.opened = 0
        """Of the line where the quote begins that was the last to go on into another line."""
        self.problem: BadRecord | None = None
        """What is wrong with a line of the record."""
        self._is_open = False
        self._num_bytes = 0

    def begin(self) -> None:
        """Have the next line be the first one of a record."""
        self._num_bytes, self.problem, self._is_open = 0, None, False

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
                f"{self.name}:{self.first}: a row of over {MAX_LINE_BYTES} bytes; is the quote in "
                f"line {self.opened} never closed?"
            )
        self._seen(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = self.problem or not_utf8(error.start + 1)
            text = line.decode("utf-8", "replace")
        return self._with_plain_quotes(text) if '"' in text else text

    def _with_plain_quotes(self, line: str) -> str:
        """Return a line without blanks around quoted cells. A cell of TSV that begins with a quote
        and goes on behind its end is text: it comes quoted."""
        parts, at, is_start = [], 0, not self._is_open
        if self._is_open:
            rest = _REST_OF_QUOTED.match(line)
            if rest is None:
                return line
            parts, at, self._is_open = [rest[0]], rest.end(), False
            at = self._passed(line, at)
        while True:
            end = line.find(self._delimiter, at)
            start = _BLANKS.match(line, at).end()  # type: ignore[union-attr]
            if is_start and line.startswith('"', start):
                cell = _QUOTED.match(line, start)
                if cell is None:
                    self._is_open, self.opened = True, self.number
                    return "".join([*parts, line[start:]])
                behind = self._passed(line, cell.end())
                if behind > cell.end() or self._ends_cell(line, behind):
                    parts.append(cell[0])
                    at = behind
                    end = line.find(self._delimiter, at)
                elif self._delimiter == "\t":
                    text = (line[at:] if end < 0 else line[at:end]).rstrip("\r\n")
                    parts.append('"' + text.replace('"', '""') + '"')
                    at += len(text)
            if end < 0:
                return "".join([*parts, line[at:]])
            parts.append(line[at : end + 1])
            at, is_start = end + 1, True

    def _passed(self, line: str, at: int) -> int:
        """Return where the blanks behind a quoted cell end, if the cell ends there."""
        end = _BLANKS.match(line, at).end()  # type: ignore[union-attr]
        return end if self._ends_cell(line, end) else at

    def _ends_cell(self, line: str, at: int) -> bool:
        return line[at : at + 1] in ("", self._delimiter, "\r", "\n")


def _parted(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines. Old Macs end theirs in a carriage return alone: where the first line
    has one, each part up to one is a line."""
    parts, number = False, 0
    for number_before, line in lines:
        if number_before == 1:
            parts = b"\r" in line.rstrip(b"\r\n")
        if not parts:
            yield number_before, line
            continue
        for part in line.splitlines(keepends=True):
            number += 1
            yield number, part


def _checked_header(cells: Iterable[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(header) > _MAX_COLUMNS:
        raise UserError(f"{where}: {len(header)} columns; {_MAX_COLUMNS} are the most that is read")
    counts = Counter(name for name in header if name).most_common(1)
    if counts and counts[0][1] > 1:
        raise UserError(f"{where}: {counts[0][1]} columns are called {quoted(counts[0][0])}")
    return header


def _row(header: list[str], cells: list[str], delimiter: str) -> dict[str, Any] | BadRecord:
    if len(cells) > len(header) and not any(cells[len(header) :]):  # as some programs fill rows up
        cells = cells[: len(header)]
    if len(cells) != len(header):
        said = f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'} under a header of"
        if len(cells) < len(header):
            listed = ", ".join(map(named, header[len(cells) :][:4]))
            return BadRecord(f"{said} {len(header)}: there is none for {listed}")
        return BadRecord(
            f'{said} {len(header)}: quote cells with {DELIMITERS[delimiter]} in them, by "'
        )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name and cell != ""}
