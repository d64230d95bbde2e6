"""JSON lines in, records out, and back: every bad line is named by file, line number and field."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import xxhash

from engine.containers.row import BadRecord, Row, RowOrBad, RowShape
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, read_lines, replacing

_Record = TypeVar("_Record")

SKIP_OPTION = "--data.skip-bad-lines"
"""The stages' option to skip bad lines."""
_NUM_FIRST_ERRORS = 5  # enough to see the pattern, few enough to print
_NUM_SHOWN_KEYS = 8
_UTF8_BOM = b"\xef\xbb\xbf"  # Windows editors put it before the first line


@dataclass(frozen=True, kw_only=True)
class ReadReport:
    """How reading one file went."""

    num_read: int
    """Records that were read."""
    num_bad: int
    """Bad lines that were skipped; 0 unless skip_bad_lines."""
    first_errors: tuple[str, ...]
    """What was wrong with the first few bad lines."""
    xxh3_128: str = field(default="", compare=False)
    """Of the file's lines as they were read; "" where one rank reads for all."""

    def __str__(self) -> str:
        if not self.num_bad:
            return f"{self.num_read} records"
        return f"{self.num_read} records, {self.num_bad} bad lines skipped: {self.first_errors[0]}"


class RecordReader(Generic[_Record]):
    """One pass over a .jsonl or .jsonl.gz file; iterate it once, then ask for its report.

    `parse` turns one JSON object into a record or raises BadRecord. A bad line raises UserError, or
    is counted when `skip_bad_lines` is set. A file without one good record raises UserError in both
    cases. Empty lines are no records and no errors. skip_option: what sets `skip_bad_lines` where
    the file is read for a command that has such an option. shape: what stands between the file's
    rows and `parse`; None: each row is parsed as it is.
    """

    def __init__(
        self,
        path: Path | str,
        parse: Callable[[dict[str, Any]], _Record],
        *,
        skip_bad_lines: bool,
        skip_option: str = SKIP_OPTION,
        shape: RowShape | None = None,
    ) -> None:
        self.path = Path(path)
        self._name = named(path, MAX_SHOWN_PATH)
        self.share_read = 0.0  # of the file's bytes
        self._parse = parse
        self._shape = shape
        self._skip_bad_lines = skip_bad_lines
        self._advice = "correct the line" + (f", or pass {skip_option}" if skip_option else "")
        self._num_read = 0
        self._num_bad = 0
        self._first_errors: list[str] = []
        self._digest = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[_Record]:
        rows: Iterable[RowOrBad] = self._rows()
        if self._shape is not None:
            rows = self._shape(self._good(rows))
        for where, row in rows:
            try:
                if isinstance(row, BadRecord):
                    raise row
                record = self._parse(row)
            except BadRecord as error:
                self._reject(f"{where}: {error}")
            else:
                self._num_read += 1
                yield record
        if not self._num_read:
            raise UserError(self._nothing_read())

    def _rows(self) -> Iterator[RowOrBad]:
        for number, line in read_lines(self.path, self._reached):
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            line = line.rstrip()
            if not line:
                continue
            self._digest.update(line + b"\n")
            try:
                yield f"{self._name}:{number}", _parse_object(line)
            except BadRecord as error:
                yield f"{self._name}:{number}", error

    def _good(self, rows: Iterable[RowOrBad]) -> Iterator[Row]:
        """Yield those that are rows; reject the others."""
        for where, row in rows:
            if isinstance(row, BadRecord):
                self._reject(f"{where}: {row}")
            else:
                yield where, row

    def report(self) -> ReadReport:
        """Return the counts so far."""
        return ReadReport(
            num_read=self._num_read,
            num_bad=self._num_bad,
            first_errors=tuple(self._first_errors),
            xxh3_128=self._digest.hexdigest(),
        )

    def _reached(self, share: float) -> None:
        self.share_read = share

    def _reject(self, error: str) -> None:
        if not self._skip_bad_lines:
            raise UserError(f"{error}\n{self._advice}") from None
        self._num_bad += 1
        if len(self._first_errors) < _NUM_FIRST_ERRORS:
            self._first_errors.append(error)

    def _nothing_read(self) -> str:
        if not self._num_bad:
            return f"{self._name}: the file is empty; it needs one JSON object a line"
        return (
            f"{self._name}: all {self._num_bad} lines are bad; the first: {self._first_errors[0]}"
        )


def read_records(
    path: Path | str,
    parse: Callable[[dict[str, Any]], _Record],
    *,
    skip_bad_lines: bool,
    skip_option: str = SKIP_OPTION,
    shape: RowShape | None = None,
) -> tuple[list[_Record], ReadReport]:
    """Return all records of a file and the report; UserError where memory does not hold them.

    The options are those of RecordReader.
    """
    reader = RecordReader(
        path, parse, skip_bad_lines=skip_bad_lines, skip_option=skip_option, shape=shape
    )
    try:
        records = list(reader)
    except MemoryError:
        name, num_read = named(path, MAX_SHOWN_PATH), reader.report().num_read
        raise UserError(f"{name}: {num_read} records of it fill the memory there is") from None
    return records, reader.report()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the file whole or not at all."""
    with replacing(path) as stream:
        stream.writelines(json.dumps(row).encode() + b"\n" for row in rows)


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
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8: byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord(
            f"not one JSON object on one line: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise BadRecord(f"not JSON that can be read: {error}") from None
    except MemoryError:
        raise BadRecord("as JSON it takes more memory than there is") from None
    if not isinstance(value, dict):
        raise BadRecord(f"must be one JSON object, not {json_type(value)}")
    return value
