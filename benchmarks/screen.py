"""Prints a benchmark's tables so that nothing in them is cut, however narrow the screen is.

rich cuts a word for which a column has no room, numbers too.
"""

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 160
"""Columns of what is no terminal, such as a file; our choice: most tables take a line a row."""


def screen() -> Console:
    """Return where results are printed: as wide as the terminal is, or FILE_WIDTH columns."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def print_whole(console: Console, table: Table | Text) -> None:
    """Print a table whose lines break between words, or text as it is.

    Where a word or number of a table would find no room, its rows are printed as lines.
    """
    is_whole = isinstance(table, Text) or _fits(console, table)
    console.print(table if is_whole else _as_lines(table))


def _fits(console: Console, table: Table) -> bool:
    """Give every column the width of its longest word, and the narrow ones what is over.

    False where the words alone are too wide.
    """
    wanted = {}
    for column in table.columns:
        cells = (column.header, *column.cells)
        widths = [Measurement.get(console, console.options, cell) for cell in cells]
        column.width = max(width.minimum for width in widths)
        wanted[id(column)] = max(width.maximum for width in widths)
    boundless = console.options.update(width=sys.maxsize)
    spare = console.width - Measurement.get(console, boundless, table).maximum
    for _ in range(spare):
        cut = [column for column in table.columns if column.width < wanted[id(column)]]
        if cut:
            min(cut, key=lambda column: column.width).width += 1
    return spare >= 0


def _as_lines(table: Table) -> Text:
    """Return a line for every cell that has text, behind its heading; all but a row's first are
    set in."""
    lines = [table.title]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        indent = ""
        for column, cell in zip(table.columns, cells, strict=True):
            if str(cell):
                lines.append(f"{indent}{column.header}: {cell}")
            indent = "    "
    lines.append(table.caption)
    return Text("\n".join(str(line) for line in lines if line is not None))
