"""A row: what every container of data is read as, a place in it and fields by name."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = tuple[str, dict[str, Any]]
"""Where a row stands, as an error names it ("a.csv:17", "a.parquet: row 17"), and its fields."""


class BadRecord(Exception):
    """What is wrong with one row or record, and in which field; who reads it adds where it is."""

    def __init__(self, problem: str, *, field: str | None = None) -> None:
        super().__init__(f'field "{field}" {problem}' if field else problem)


RowOrBad = tuple[str, dict[str, Any] | BadRecord]
"""The same, or in the place of the fields what is wrong there."""

RowShape = Callable[[Iterator[Row]], Iterable[RowOrBad]]
"""From the rows of one source to those that are parsed: each as another, as several, or many as
one."""
