"""What a preparation kept and dropped: report.json for programs, report.md and a screen for people.

The same logs and settings give the same bytes: no time and no path of this machine is in it, but
the names of the logs as they were given.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from engine.prepare.lengths import LENGTH_COLUMNS, Lengths, Measures
from engine.prepare.logs import SETS, LogRecord
from engine.prepare.split import SPLITS
from engine.printable import printable

REASONS = {
    "duplicate": "shares a long beginning with an earlier prompt",
    "over_cap": "its user has more prompts than are kept",
    "trained_on": "held out here, and trained on in another data set",
    "personal": "has personal data; addresses at example.com and the like are nobody's, and stay",
    "left_out": "its label teaches nothing (a tie, a reply not to be trained); its prompt stays",
    "bad_line": "could not be read",
}
"""Why a record was dropped, and what that means."""
_MOST_NAMES = 1000  # different use cases that are told apart; our choice
_OTHER = "(others)"
_NUM_SHOWN = 20  # rows of a table of languages or use cases; our choice
_CELL_CHARACTERS = 40  # of a screen
_PAGE_CHARACTERS = 200  # of a page


class TextTable(NamedTuple):
    """A table of texts: a name, its heads, its rows."""

    title: str
    heads: Sequence[str]
    rows: list[Sequence[str]]


class Summary:
    """Counts, as the records are written."""

    def __init__(self, measures: Measures) -> None:
        self.read: Counter[str] = Counter()
        self.reserved_emails = 0
        self._kept: Counter[tuple[str, str]] = Counter()
        self._users: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._personal: Counter[str] = Counter()
        self._languages: Counter[tuple[str, str]] = Counter()
        self._kinds: Counter[tuple[str, str]] = Counter()
        self._lengths = Lengths(measures)

    def keep(self, name: str, split: str, record: LogRecord, *, user: int, language: str) -> None:
        """Count a record that is kept in a data set; language: "" where nobody asks for it."""
        self._kept[name, split] += 1
        self._users[name, split].add(user)
        if language:
            self._languages[name, language] += 1
        names = [("prompt", name, split)]
        if record.kind is not None:
            seen = self._kinds.keys()
            is_told = len(seen) < _MOST_NAMES or (name, record.kind) in seen
            kind = record.kind if is_told else _OTHER
            self._kinds[name, kind] += 1
            names.append(("kind", name, kind))
        self._lengths.add(record.prompt_text(), *names)
        if name == "sft":
            self._lengths.add(record.response or "", ("response", name, split))

    def drop(self, name: str, reason: str) -> None:
        """Count a record that is dropped from a data set, or a bad line, which is of none: ""."""
        self._dropped[name, reason] += 1

    def personal(self, kinds: set[str]) -> None:
        """Count a record in which personal data of some kinds were found."""
        self._personal.update(kinds)

    def as_object(self) -> dict[str, Any]:
        """Return all of it, as report.json has it."""
        lengths: dict[str, Any] = defaultdict(list)
        for (text, name, part, measure), numbers in sorted(self._lengths.summary().items()):
            part_name = "kind" if text == "kind" else "split"
            row = {"set": name, part_name: part, "in": measure, **numbers}
            lengths[f"{text}s"].append(row)
        return {
            "sets": {name: self._set(name) for name in SETS if self.read[name]},
            "bad_lines": self._dropped["", "bad_line"],
            "records_with_personal_data": dict(sorted(self._personal.items())),
            "reserved_emails": self.reserved_emails,
            "languages": _nested(self._languages),
            "kinds": _nested(self._kinds),
            "lengths": dict(lengths),
        }

    def _set(self, name: str) -> dict[str, Any]:
        kept = {split: self._kept[name, split] for split in SPLITS}
        users = {split: len(self._users[name, split]) for split in SPLITS}
        dropped = {r: self._dropped[name, r] for r in REASONS if self._dropped[name, r]}
        return {"read": self.read[name], "dropped": dropped, "kept": kept, "users": users}


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return {data set: {name: count}}, the most frequent names first."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for (name, key), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        found[name][key] = count
    return dict(found)


def tables(report: Mapping[str, Any]) -> Iterator[TextTable]:
    """Yield what report.json says, as tables; those for a screen come first."""
    sets = report["sets"]
    heads = ("", *sets)
    rows: list[Sequence[str]] = [("read", *(_number(sets[n]["read"]) for n in sets))]
    for reason in REASONS:
        counts = [sets[n]["dropped"].get(reason, 0) for n in sets]
        if any(counts):
            rows.append((f"dropped: {reason}", *map(_number, counts)))
    for split in SPLITS:
        rows.append((f"kept: {split}", *(_number(sets[n]["kept"][split]) for n in sets)))
    if report["split"]["by"] == "user":
        rows.append(("users kept", *(_number(sum(sets[n]["users"].values())) for n in sets)))
    if report["bad_lines"]:
        rows.append(("bad lines", _number(report["bad_lines"]), *([""] * (len(sets) - 1))))
    yield TextTable("Kept and dropped", heads, rows)
    found = report["records_with_personal_data"]
    if found:
        rows = [(kind, _number(count)) for kind, count in found.items()]
        yield TextTable("Records with personal data", ("kind", "records"), rows)
    for name, counts in report["languages"].items():
        total = sum(counts.values())
        rows = [(k, _number(n), f"{n / total:.1%}") for k, n in list(counts.items())[:_NUM_SHOWN]]
        yield TextTable(f"Languages of {name}", ("language", "prompts", "share"), rows)
    for key, column in (("prompts", "split"), ("responses", "split"), ("kinds", "kind")):
        yield from _length_tables(report["lengths"].get(key, []), key, column)
    if report["largest_duplicates"]:
        rows = [(r["set"], r["kept"], _number(r["times"])) for r in report["largest_duplicates"]]
        yield TextTable("Most duplicates", ("data set", "kept", "times"), rows)


def _length_tables(
    listed: Sequence[Mapping[str, Any]], key: str, column: str
) -> Iterator[TextTable]:
    """Yield a table of lengths for each measure; of many use cases the most frequent."""
    for measure in sorted({row["in"] for row in listed}):
        of_measure = [row for row in listed if row["in"] == measure]
        if column == "split":
            of_measure.sort(key=lambda r: (SETS.index(r["set"]), SPLITS.index(r["split"])))
        else:
            of_measure.sort(key=lambda r: (-r["n"], r["set"], r["kind"]))
        rows: list[Sequence[str]] = [
            (r["set"], r[column], _number(r["n"]), *(f"{r[c]:.5g}" for c in LENGTH_COLUMNS))
            for r in of_measure[:_NUM_SHOWN]
        ]
        title = "Prompts by use case" if key == "kinds" else key.capitalize()
        yield TextTable(f"{title}, in {measure}", ("data set", column, "n", *LENGTH_COLUMNS), rows)


def in_markdown(report: Mapping[str, Any], remarks: Iterable[str]) -> str:
    """Return the report as Markdown, with what is odd of it and what each reason means."""
    parts = ["# What was kept, and what was dropped and why\n"]
    parts += [f"- {printable(remark, one_line=True)}" for remark in remarks]
    parts.append("\nWhy a record was dropped:\n")
    parts += [f"- `{reason}`: {meaning}" for reason, meaning in REASONS.items()]
    parts.append("\nEach dropped record is a line of dropped.jsonl. Texts are in neither file.\n")
    for table in tables(report):
        lines = [table.heads, ["---"] * len(table.heads), *table.rows]
        parts.append(f"## {table.title}\n")
        parts += [f"| {' | '.join(_cell(c, _PAGE_CHARACTERS) for c in cells)} |" for cells in lines]
        parts.append("")
    return "\n".join(parts)


def for_screen(table: TextTable) -> Table:
    """Return a table for a terminal."""
    shown = Table(title=table.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, head in enumerate(table.heads):
        shown.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*map(_cell, row))
    return shown


def _cell(text: str, limit: int = _CELL_CHARACTERS) -> str:
    return printable(text, limit=limit, one_line=True).replace("|", "\\|")


def _number(value: int) -> str:
    return f"{value:,}"
