"""JSON lines: an object a line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.containers.lines import read_lines
from engine.containers.row import BadRecord, RowOrBad, json_type
from engine.errors import named
from engine.files import MAX_SHOWN_PATH

_raw_decode = json.JSONDecoder().raw_decode
UTF8_BOM = b"\xef\xbb\xbf"
"""Windows editors put it before the first line; it is no text."""
# Windows' own has Latin-1's letters, and quotes where that has control characters.
ENCODING_ADVICE = "Latin-1 or Windows'? `iconv -f cp1252 -t utf-8` makes it UTF-8"
"""What to do with text that is no UTF-8."""


def json_line_rows(
    path: Path, reached: Callable[[float], object], seen: Callable[[bytes], object]
) -> Iterator[RowOrBad]:
    """Yield the object of each line that is not empty; options and errors as those of read_rows."""
    name = named(path, MAX_SHOWN_PATH)
    for number, line in read_lines(path, reached):
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        line = line.rstrip()
        if not line:
            continue
        seen(line)
        seen(b"\n")
        if (row := _plain_object(line)) is not None:
            yield f"{name}:{number}", row
            continue
        try:
            yield f"{name}:{number}", parse_object(line)
        except BadRecord as error:
            yield f"{name}:{number}", error


def _plain_object(line: bytes) -> dict[str, Any] | None:
    """Return what parse_object does of a line without blanks around it, or None where that has more
    to look at. Most lines are read here, which spares json.loads' own looks at each."""
    try:
        text = line.decode()
        value, end = _raw_decode(text)
    except (ValueError, RecursionError, MemoryError):
        return None
    is_plain = end == len(text) and value.__class__ is dict and b"null" not in line
    return value if is_plain else None


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds, without the fields that are null; raises BadRecord."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error.start + 1) from None
    except json.JSONDecodeError as error:
        how = " (Python's way to write it? write it by json.dumps)" if line[1:2] == b"'" else ""
        raise BadRecord(
            f"not one JSON object on one line: {error.msg} at column {error.colno}{how}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise BadRecord(f"not JSON that can be read: {error}") from None
    except MemoryError:
        raise BadRecord("as JSON it takes more memory than there is") from None
    return only_object(value) if b"null" in line else _checked(value)


def only_object(value: Any) -> dict[str, Any]:
    """Return a parsed value that is to be a row, without the fields that are null, at any depth: so
    do libraries write fields that a row has not. Raises BadRecord."""
    try:
        return _checked(without_nulls(value))
    except RecursionError as error:
        raise BadRecord(f"not JSON that can be read: {error}") from None


def without_nulls(value: Any) -> Any:
    """Return a value whose objects have no null fields, at any depth; a list keeps its nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def not_utf8(number: int) -> BadRecord:
    """Return what is wrong with a line whose byte of that number is none of UTF-8's."""
    return BadRecord(f"not UTF-8: byte {number} of the line ({ENCODING_ADVICE})")


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"must be one JSON object, not {json_type(value)}")
    return value
