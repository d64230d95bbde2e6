"""A row: what every container of data is read as, a place in it and fields by name."""

from typing import Any


class BadRecord(Exception):
    """What is wrong with one row or record, and in which field; who reads it adds where it is."""

    def __init__(self, problem: str, *, field: str | None = None) -> None:
        super().__init__(f'field "{field}" {problem}' if field else problem)


RowOrBad = tuple[str, dict[str, Any] | BadRecord]
"""Where a row stands, as an error names it ("a.csv:17", "a.parquet: row 17"), and its fields; or in
the place of the fields what is wrong there."""
