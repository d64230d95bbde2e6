"""Which fields of a file's rows are read, and as what: --data.fields.

"auto": the first good row says which shape the file's rows have (engine/shapes/shapes.py), once for
all. NAME: they have that shape. "prompt=question.text,response=answers.0": these fields are ours,
and others that are ours by name stay. A dot leads into an object or a list, where no field has that
name.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.containers.row import BadRecord, RowOrBad, required
from engine.errors import UserError, named, quoted
from engine.shapes.canonical import NEEDS, LeftOut, Purpose, Row
from engine.shapes.held_lists import with_lists
from engine.shapes.prompt_parts import (
    SYSTEMS,
    asked_of,
    check_all_said,
    is_said,
    unread_parts,
    with_system,
)
from engine.shapes.readers import purposes_of, read_by
from engine.shapes.shapes import PLAIN, SHAPES, nearly, recognised

OURS = (
    *("prompt", "response", "messages", "completions", "ranks", "scores", "chosen", "rejected"),
    "text",
)
"""Fields that a mapping may fill."""
_PAIR, _RANKING = {"chosen", "rejected"}, {"completions", "ranks", "scores"}
NOTHING: Mapping[Purpose, str] = {
    "demonstrations": "has no answer to imitate",
    "comparisons": "has no answers of one prompt that are ranked",
    "prompts": "has no prompts",
    "text": "has no text",
}
"""What is said of data that has nothing for a purpose."""


class Fields:
    """How one file's rows become records: a callable over its rows, each with where it stands.

    option: names the fields; "" for a command that has none. Raises UserError for a choice that is
    none, and for a file that has nothing for the purpose.
    """

    def __init__(
        self,
        purpose: Purpose,
        fields: str = "auto",
        *,
        option: str = "--data.fields",
    ) -> None:
        self._purpose, self._option = purpose, option
        name, self._mapping = choice_of(fields, option)
        if purpose == "text":
            self._mapping = {k: v for k, v in self._mapping.items() if k == "text"}
        else:
            self._mapping.pop("text", None)
        self._name = PLAIN if self._mapping else name
        self._is_open = fields == "auto"
        self.read_as = ""
        """In words, once a row was read; "" for our own fields."""
        self._has_good = False  # rows; then one without an answer lacks it, and is for no other
        self.left_out: Counter[str] = Counter()
        """Of what a data set has, how many are no record, by why."""

    def __call__(self, rows: Iterable[RowOrBad]) -> Iterator[RowOrBad]:
        """Yield the records of rows; BadRecord stands for a row that is bad."""
        held: list[tuple[str, Row]] = []
        for where, row in rows:
            if isinstance(row, BadRecord):
                yield where, row
                continue
            try:
                row = self._ours(row, where)
            except BadRecord as error:
                yield where, error
                continue
            if self._purpose == "text":
                yield where, row
            elif SHAPES[self._name or PLAIN].gather is not None:
                held.append((where, row))
            else:
                yield from self._records(where, row)
        if held:
            yield from self._gathered(held)

    def _gathered(self, held: list[tuple[str, Row]]) -> Iterator[RowOrBad]:
        gather = SHAPES[self._name or PLAIN].gather
        for where, row in gather(held) if gather is not None else held:
            if isinstance(row, LeftOut):
                self.left_out[row.reason] += 1
            else:
                yield from self._records(where, row)

    def _records(self, where: str, row: Row) -> Iterator[RowOrBad]:
        try:
            found = self._with_all_parts(row)
        except BadRecord as error:
            yield where, error
            return
        for record in found:
            if isinstance(record, LeftOut):
                self.left_out[record.reason] += 1
                continue
            yield where, record

    def _with_all_parts(self, row: Row) -> Sequence[Row | LeftOut]:
        """Return the records of a row, with what its shape does not read of its prompt; BadRecord
        where that cannot be. Who names a shape or fields has chosen what is left out; a system
        prompt is by a mapping alone.
        """
        shape = SHAPES[self._name or PLAIN]
        found = shape.read(row, self._purpose)
        read = shape.claimed(row) or OURS
        unread = [] if self._mapping else unread_parts(row, read)
        if not unread:
            return found
        systems = [key for key in unread if key in SYSTEMS and isinstance(row[key], str)]
        asked = asked_of(row) if shape is SHAPES[PLAIN] else shape.read(row, "prompts")
        if self._is_open:
            others = [key for key in unread if key not in systems]
            check_all_said(row, others, asked, self._advice("name the fields by ", behind=", or "))
        for key in systems:
            if is_said(row[key], asked):
                continue
            found = [
                record if isinstance(record, LeftOut) else with_system(record, key, row[key])
                for record in found
            ]
        return found

    def _ours(self, row: Row, where: str) -> Row:
        """Return a row of the file's shape, which the first one decides."""
        if self._purpose == "text":
            return self._text(row)
        if self._mapping:
            row = self._mapped(row)
        if self._name is None:
            self._name = self._decided(row)
        if not self.read_as:
            self._check_purpose(where)
            self._say(row)
        if self._name == PLAIN:
            self._check_plain(row)
        elif SHAPES[self._name].keys and not SHAPES[self._name].claimed(row):
            others = [name for name in recognised(row) if name != self._name]
            said = f"of the shape {others[0]}" if others else f"of no shape; there is {_keys(row)}"
            raise BadRecord(f"is {said}, in a file of {SHAPES[self._name].title}")
        if SHAPES[self._name].gather is not None and self._is_open:
            unread = unread_parts(row, SHAPES[self._name].claimed(row))
            advice = self._advice("name the fields by ", behind=", or ")
            check_all_said(row, unread, row.get("prompt"), advice)
        self._has_good = True
        return row

    def _decided(self, row: Row) -> str:
        found = recognised(row)
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            advice = f"; name one: {self._option} {found[0]}, or the fields" if self._option else ""
            raise BadRecord(f"may be of {' or '.join(found)}{advice}{self._advice(': ')}")
        raise self._unknown(row)

    def _unknown(self, row: Row) -> BadRecord:
        """Return what is to be said of a row whose fields are of no shape, or for another stage."""
        for_others = purposes_of(row)
        if for_others and self._purpose not in for_others and not self._has_good:
            return self._for_others(row, for_others)
        key = "prompt" if "prompt" not in row else _wanted(self._purpose)
        names = [] if self._has_good else nearly(row)
        near = [f"{name} ({SHAPES[name].keys})" for name in names]
        known = f"; a known shape that is near: {', '.join(near)}" if near else ""
        if alike := _alike_but_for_case(row):
            known = "; names are told apart by their capitals and blanks"
        advice = self._advice("; name the fields by ", alike)
        try:
            required(row, key)
        except BadRecord as error:
            return BadRecord(f"{error}{known}{advice}")
        return BadRecord(f"is of no known shape; there is {_keys(row)}{known}")

    def _for_others(self, row: Row, purposes: Sequence[Purpose]) -> BadRecord:
        said = read_by(purposes, with_options=bool(self._option))
        return BadRecord(
            f"{NOTHING[self._purpose]}; there is {_keys(row)}: {said}"
            f"{self._advice('; or name the fields by ')}",
            says_remedy=True,
        )

    def _advice(self, words: str, fields: str = "", *, behind: str = "") -> str:
        """Return how fields are named, between some words; "" for a command without the option."""
        named_by = f"{words}{self._option} {fields or NEEDS[self._purpose]}{behind}"
        return named_by if self._option else ""

    def _check_plain(self, row: Row) -> None:
        """Raise BadRecord for a row in our own fields that lacks those of the purpose."""
        has = {
            "demonstrations": {"response", "messages"},
            "comparisons": {"chosen", "rejected", "completions"},
            "prompts": {"prompt", "messages", "chosen"},
        }
        if not has[self._purpose] & row.keys():
            raise self._unknown(row)

    def _check_purpose(self, where: str) -> None:
        shape = SHAPES[self._name or PLAIN]
        if self._purpose not in shape.has:
            raise UserError(
                f"{where}: a file of {shape.title} ({self._name}) {NOTHING[self._purpose]}; it has "
                f"{read_by(shape.has, with_options=bool(self._option))}"
            )

    def _say(self, row: Row) -> None:
        if self._mapping:
            self.read_as = ", ".join(f"{ours}={theirs}" for ours, theirs in self._mapping.items())
        elif self._name not in (None, PLAIN):
            shape = SHAPES[self._name]
            fields = [key for key in row if key in shape.claimed(row)]
            self.read_as = f"{self._name}: {', '.join(map(named, fields))}"

    def _mapped(self, row: Row) -> Row:
        kept = {key: row[key] for key in (*OURS, "label") if key in row}
        for one, other in (_PAIR, _RANKING), (_RANKING, _PAIR):
            if one & self._mapping.keys():  # who names one of the two means it
                kept = {key: value for key, value in kept.items() if key not in other}
        found = {ours: value_at(row, theirs) for ours, theirs in self._mapping.items()}
        return with_lists(kept | found)

    def _text(self, row: Row) -> Row:
        """Return a row of text; code and some books have it as `content`."""
        if self._mapping:
            self.read_as = f"text={self._mapping['text']}"
            return {"text": value_at(row, self._mapping["text"])}
        if "text" not in row and isinstance(row.get("content"), str) and "role" not in row:
            self.read_as = "text=content"
            return {"text": row["content"]}
        if "text" not in row:
            raise self._missing_text(row)
        self._has_good = True
        return row

    def _missing_text(self, row: Row) -> BadRecord:
        if not self._has_good and (for_others := purposes_of(row)):
            return self._for_others(row, for_others)
        try:
            required(row, "text")
        except BadRecord as error:
            return BadRecord(f"{error}{self._advice('; name it by ')}")
        return BadRecord("has no text")


def choice_of(fields: str, option: str) -> tuple[str | None, dict[str, str]]:
    """Return the name of the shape that is chosen, None without one, and {ours: theirs} of a
    mapping; UserError for what is neither."""
    if "=" in fields:
        return None, _parsed(fields, option)
    if fields == "auto":
        return None, {}
    _check_name(fields, option)
    return fields, {}


def fields_option(skip_option: str) -> str:
    """Return the option for fields of a command whose option to skip bad lines this is; "" for one
    that has none."""
    return skip_option.replace("skip-bad-lines", "fields")


def reading_options(data: Any) -> dict[str, Any]:
    """Return what a stage's settings of data say of how its files are read."""
    return {name: getattr(data, name) for name in ("fields", "skip_bad_lines")}


def _wanted(purpose: Purpose) -> str:
    return {"demonstrations": "response", "comparisons": "completions"}.get(purpose, "prompt")


def _keys(row: Row) -> str:
    names = [named(key) for key in list(row)[:8]]
    return ", ".join(names) or "nothing"


def _alike_but_for_case(row: Row) -> str:
    """Return the mapping of fields that are ours but for capitals and blanks; "" without any."""
    alike = {key.strip().lower(): key for key in row if key not in OURS}
    return ",".join(f"{ours}={alike[ours]}" for ours in OURS if ours in alike)


def value_at(row: Row, path: str) -> Any:
    """Return what a dotted path leads to; BadRecord where it leads to nothing."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and value.get(part) is not None:
            value = value[part]
        else:
            raise BadRecord(f"is missing; there is {_keys(row)}", field=path)
    return value


def _parsed(fields: str, option: str) -> dict[str, str]:
    """Return {ours: theirs} of "ours=theirs,ours=theirs"; raises UserError."""
    found: dict[str, str] = {}
    for part in fields.split(","):
        ours, equals, theirs = (each.strip() for each in part.partition("="))
        if not equals or not theirs or ours not in OURS:
            problem = f"{quoted(ours)} is no field of ours"
            if not equals or not theirs:
                problem = f"{quoted(part)} names none"
            raise UserError(
                f"{option} {named(fields)}: {problem}; it is OURS=THEIRS,... with ours of "
                f"{', '.join(OURS)}"
            )
        if ours in found:
            raise UserError(f"{option} {named(fields)}: {ours} is named twice")
        found[ours] = theirs
    return found


def _check_name(name: str, option: str) -> None:
    if name in SHAPES:
        return
    near = difflib.get_close_matches(name, SHAPES, n=3, cutoff=0.5)
    meant = f"perhaps {' or '.join(near)}" if near else f"there are auto, {', '.join(SHAPES)}"
    raise UserError(
        f"{option} {named(name)}: no such shape; {meant}; or name the fields: OURS=THEIRS,..."
    )
