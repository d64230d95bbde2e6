"""A row: what every container of data is read as, a place in it and fields by name."""

import itertools
from typing import Any

from engine.errors import named

_NUM_SHOWN_KEYS = 8


class BadRecord(Exception):
    """What is wrong with one row or record, and in which field; who reads it adds where it is.

    says_remedy: the problem says what to do, and correcting the line is not it.
    """

    def __init__(
        self, problem: str, *, field: str | None = None, says_remedy: bool = False
    ) -> None:
        super().__init__(f'field "{field}" {problem}' if field else problem)
        self.says_remedy = says_remedy


RowOrBad = tuple[str, dict[str, Any] | BadRecord]
"""Where a row stands, as an error names it ("a.csv:17", "a.parquet: row 17"), and its fields; or in
the place of the fields what is wrong there."""


def required(record: dict[str, Any], key: str, *, within: str = "") -> Any:
    """Return record[key]; BadRecord when it is missing. `within` is the path to a nested object."""
    if key not in record:
        names = [named(name) for name in itertools.islice(record, _NUM_SHOWN_KEYS)]
        if len(record) > len(names):
            names[-1] += f" and {len(record) - len(names)} more"
        keys = ", ".join(names) or "nothing"
        raise BadRecord(f"is missing; there is {keys}", field=f"{within}{key}")
    return record[key]


def check_text(value: Any, field: str) -> str:
    """Return `value` when it is a text with something in it; BadRecord otherwise."""
    if not isinstance(value, str):
        raise BadRecord(f"must be a string, not {json_type(value)}", field=field)
    if not value.strip():
        raise BadRecord("is empty", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell it ("\\ud800"), but no tokenizer can turn it into bytes.
        raise BadRecord("holds half of a surrogate pair", field=field) from None
    return value


def json_type(value: Any) -> str:
    """Return JSON's own word for the type of a parsed value, with its article."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null", bytes: "binary data"}
    return names[type(value)]
