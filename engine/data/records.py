"""Records in, of any container of data, and JSON lines out: every bad row is named by its file, its
place and its field."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import xxhash

from engine.containers.row import BadRecord, RowOrBad
from engine.containers.rows import read_rows
from engine.containers.sources import DataSource, one_source, sources_of
from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, replacing
from engine.shapes.held_lists import with_lists

_Record = TypeVar("_Record")

SKIP_OPTION = "--data.skip-bad-lines"
"""The stages' option to skip bad lines."""
_NUM_FIRST_ERRORS = 5  # enough to see the pattern, few enough to print


@dataclass(frozen=True, kw_only=True)
class ReadReport:
    """How reading a file went, or several."""

    num_read: int
    """Records that were read."""
    num_bad: int
    """Bad lines that were skipped; 0 unless skip_bad_lines."""
    first_errors: tuple[str, ...]
    """What was wrong with the first few bad lines."""
    path: str = field(default="", compare=False)
    """The file."""
    read_as: str = ""
    """Of which shape its rows are, and which fields are read; "" for our own."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What the data set has that is no record, and no bad line either: how many, by why."""
    xxh3_128: str = field(default="", compare=False)
    """Of the files' rows as they were read; "" where one rank reads for all."""
    sources: tuple[tuple[str, str], ...] = ()
    """Where several were named, or one with a weight: (its name, how reading it went)."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """The same in full: each one's as_object(), its weight and how many records count an epoch."""

    def __str__(self) -> str:
        parts = [f"{self.num_read} records"]
        if self.read_as:
            parts.append(f"read as {self.read_as}")
        parts += [f"left out: {number} {why}" for why, number in self.left_out.items()]
        if self.num_bad:
            parts.append(f"{self.num_bad} bad lines skipped: {self.first_errors[0]}")
        return ", ".join(parts)

    def as_object(self) -> dict[str, Any]:
        """Return what was read and what was not, with every number and reason."""
        found = {
            "path": self.path,
            "read_as": self.read_as or "plain",
            "records": self.num_read,
            "bad_lines": self.num_bad,
            "first_errors": list(self.first_errors),
            "left_out": dict(self.left_out),
        }
        return found | ({"parts": [dict(part) for part in self.parts]} if self.parts else {})

    def notes(self, path: object, more: str = "") -> list[str]:
        """Return what is to be told of the files at a path: one note each, and one of all.

        more: what else there is to say of them.
        """
        if not self.sources:
            return [f"{path}: {self}{more}"]
        notes = [f"{name}: {said}" for name, said in self.sources]
        return [*notes, f"{path}: {self.num_read} records in all{more}"]


class Shaping(Protocol):
    """What makes records of a file's rows (engine/shapes/fields.py), and what it says of it."""

    read_as: str
    left_out: Counter[str]

    def __call__(self, rows: Iterable[RowOrBad]) -> Iterator[RowOrBad]:
        """Yield records, each with where it stands, of rows that have it too."""


def joined_report(reports: Sequence[tuple[DataSource, ReadReport, int]]) -> ReadReport:
    """Return the report of several sources, each with its own one and the number of its records
    that count an epoch."""
    first_errors = itertools.chain.from_iterable(report.first_errors for _, report, _ in reports)
    sources = [
        (source.name, f"{report}" + ("" if source.weight == 1 else f"; {num_taken} an epoch"))
        for source, report, num_taken in reports
    ]
    parts = [
        report.as_object()
        | {"path": source.path, "weight": source.weight, "records_an_epoch": num_taken}
        for source, report, num_taken in reports
    ]
    is_plain = len(reports) == 1 and reports[0][0].weight == 1
    left_out: Counter[str] = Counter()
    for _, report, _ in reports:
        left_out.update(report.left_out)
    return ReadReport(
        path=",".join(source.name for source, _, _ in reports),
        read_as="; ".join(dict.fromkeys(r.read_as for _, r, _ in reports if r.read_as)),
        left_out=dict(left_out),
        num_read=sum(report.num_read for _, report, _ in reports),
        num_bad=sum(report.num_bad for _, report, _ in reports),
        first_errors=tuple(itertools.islice(first_errors, _NUM_FIRST_ERRORS)),
        xxh3_128=xxhash.xxh3_128_hexdigest("".join(r.xxh3_128 for _, r, _ in reports).encode()),
        sources=() if is_plain else tuple(sources),
        parts=() if is_plain else tuple(parts),
    )


class RecordReader(Generic[_Record]):
    """One pass over a source of data, or all that a path names; iterate it once, then ask for its
    report.

    `parse` turns a row into a record or raises BadRecord. A bad row raises UserError, or is counted
    when `skip_bad_lines` is set. A source without one good record raises UserError in both cases.
    Empty lines are no records and no errors. skip_option: what sets `skip_bad_lines` where the file
    is read for a command that has such an option. on_bad is told where each row stands that is
    skipped, and why. shaping: returns what makes of the source's rows those that `parse` takes;
    None: they are so already.
    """

    def __init__(
        self,
        source: DataSource | Path | str,
        parse: Callable[[dict[str, Any]], _Record],
        *,
        skip_bad_lines: bool,
        skip_option: str = SKIP_OPTION,
        on_bad: Callable[[str, str], object] = lambda where, why: None,
        shaping: Callable[[], Shaping] | None = None,
    ) -> None:
        self.source = source if isinstance(source, DataSource) else one_source(source)
        self.share_read = 0.0  # of the files
        self.where = ""  # the record that came last stood
        self._on_bad = on_bad
        self._parse = parse
        self._shaping = shaping() if shaping is not None else None
        self._skip_bad_lines = skip_bad_lines
        self._advice = "correct the line" + (f", or pass {skip_option}" if skip_option else "")
        self._num_files = 0  # that have been read
        self._num_read = 0
        self._num_bad = 0
        self._first_errors: list[str] = []
        self._digest = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[_Record]:
        rows: Iterator[RowOrBad] = self._rows()
        for where, row in rows if self._shaping is None else self._shaping(rows):
            self.where = where
            try:
                if isinstance(row, BadRecord):
                    raise row
                record = self._parse(row)
            except BadRecord as error:
                self._reject(where, error)
                self._on_bad(where, str(error))
            else:
                self._num_read += 1
                yield record
        if not self._num_read:
            raise UserError(self._nothing_read())

    def report(self) -> ReadReport:
        """Return the counts so far."""
        return ReadReport(
            num_read=self._num_read,
            num_bad=self._num_bad,
            first_errors=tuple(self._first_errors),
            path=self.source.name,
            read_as=shaping.read_as if (shaping := self._shaping) else "",
            left_out=dict(shaping.left_out) if shaping else {},
            xxh3_128=self._digest.hexdigest(),
        )

    def _rows(self) -> Iterator[RowOrBad]:
        for path in self.source.files:
            for where, row in read_rows(path, self._reached, self._digest.update):
                yield where, row if isinstance(row, BadRecord) else _with_lists(row)
            self._num_files += 1

    def _reached(self, share: float) -> None:
        self.share_read = (self._num_files + share) / len(self.source.files)

    def _reject(self, where: str, error: BadRecord) -> None:
        said = f"{where}: {error}"
        if not self._skip_bad_lines:
            advice = "" if error.says_remedy else f"\n{self._advice}"
            raise UserError(f"{said}{advice}") from None
        self._num_bad += 1
        if len(self._first_errors) < _NUM_FIRST_ERRORS:
            self._first_errors.append(said)

    def _nothing_read(self) -> str:
        name = named(self.source.name, MAX_SHOWN_PATH)
        if left_out := self.report().left_out:
            said = ", ".join(f"{number} {why}" for why, number in left_out.items())
            return f"{name}: nothing of it is a record; left out: {said}"
        if not self._num_bad:
            needs = "it needs rows, such as one JSON object a line"
            return f"{name}: the file is empty, or has a header alone; {needs}"
        return f"{name}: all {self._num_bad} lines are bad; the first: {self._first_errors[0]}"


def _with_lists(row: dict[str, Any]) -> dict[str, Any] | BadRecord:
    try:
        return with_lists(row)
    except BadRecord as error:
        return error


def read_records(
    path: Path | str,
    parse: Callable[[dict[str, Any]], _Record],
    *,
    skip_bad_lines: bool,
    skip_option: str = SKIP_OPTION,
    shaping: Callable[[], Shaping] | None = None,
) -> tuple[list[_Record], ReadReport]:
    """Return all records of what a path names (engine/containers/sources.py), each as often as its
    source's weight has it, and the report; UserError where memory does not hold them.

    The options are those of RecordReader. For weights a record is its prompt, or has one as
    `prompt`.
    """
    found: list[_Record] = []
    records: list[_Record] = []
    reports = []
    try:
        for source in sources_of(path):
            reader = RecordReader(
                source,
                parse,
                skip_bad_lines=skip_bad_lines,
                skip_option=skip_option,
                shaping=shaping,
            )
            records = []
            records.extend(reader)  # which keeps those that memory holds
            again = [each for each in records if source.has_once_more(_prompt_of(each))]
            taken = records * source.num_passes + again
            found += taken
            reports.append((source, reader.report(), len(taken)))
    except MemoryError:
        name, number = named(path, MAX_SHOWN_PATH), len(found) + len(records)
        raise UserError(f"{name}: {number} records of it fill the memory there is") from None
    return found, joined_report(reports)


def _prompt_of(record: object) -> str:
    """Return what a record's prompt is known by, as where prompts are held out: Prompt.key."""
    prompt = getattr(record, "prompt", record)
    prompt = getattr(prompt, "key", prompt)
    return prompt if isinstance(prompt, str) else repr(prompt)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the file whole or not at all."""
    with replacing(path) as stream:
        stream.writelines(json.dumps(row).encode() + b"\n" for row in rows)
