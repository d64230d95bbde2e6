"""What a log calls its fields: their values, who a user is, and how many lines have which."""

import datetime
import functools
import math
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.errors import UserError, named
from engine.settings.prepare import LogFields

ABOUT = ("user", "id", "time", "kind")
"""What is said about a record, not in it."""
_DEFAULTS = vars(LogFields())
_MOST_NAMES = 1000  # fields of all lines that are told apart; our choice
_NUM_SHOWN = 8
_WHOLE = re.compile(r"([+-]?\d+)\.0*")  # as pandas writes a column of numbers with a gap
_NOBODY = ("", "nan", "null", "none", "<na>")  # as pandas, SQL and Python write that there is none


def are_named(names: LogFields) -> bool:
    """Return whether somebody said what a prompt, or one of its labels, is called."""
    return any(ours not in ABOUT for ours in other_names(names))


@functools.cache
def other_names(names: LogFields) -> dict[str, str]:
    """Return {our name: theirs} of the fields that somebody named."""
    return {ours: theirs for ours, theirs in vars(names).items() if theirs != _DEFAULTS[ours]}


def values_of(row: dict[str, Any], names: LogFields) -> dict[str, Any]:
    """Return {our name: value} of the fields that a line has; null and NaN are none."""
    found = {ours: _at(row, theirs) for ours, theirs in vars(names).items()}
    return {ours: value for ours, value in found.items() if value is not None}


def in_their_words(error: BadRecord, row: dict[str, Any], names: LogFields) -> BadRecord:
    """Return an error with what a line itself calls the field."""
    match = re.match(r'field "(\w+)(.*)', str(error), re.DOTALL)
    theirs = other_names(names).get(match[1]) if match else None
    if match is None or theirs is None:
        return error
    if match[2].startswith('" is missing'):
        try:
            required(row, theirs)
        except BadRecord as missing:
            return missing
    return BadRecord(f'field "{theirs}{match[2]}')


def name_in(value: Any, field: str) -> str | None:
    """Return a name that is a text or a whole number, 7, 7.0 and "7.0" being one; None where there
    is none. BadRecord for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        said = f"{value}" if isinstance(value, float) else json_type(value)
        raise BadRecord(f"must be a text or a whole number, not {said}", field=field)
    if value is None or not str(value).strip():
        return None
    text = check_text(str(value).strip(), field)
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def user_in(value: Any, field: str) -> str | None:
    """Return who sent a prompt, None for nobody, as tables write it: "", nan, null or none."""
    name = name_in(value, field)
    return None if name is None or name.lower() in _NOBODY else name


def time_in(value: Any, field: str) -> float:
    """Return seconds, inf without a time; one without its zone is taken for one of UTC."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOBODY):
        return math.inf
    try:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?", value.strip()):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if abs(value) < 1e300:
                return float(value)
            raise ValueError
        found = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise BadRecord("must be a number, or a time as 2021-03-04T12:00:00", field=field) from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return found.timestamp()


class FieldsSeen:
    """Counts which fields the lines have, as they are read."""

    def __init__(self) -> None:
        self._lines = 0
        self._with: Counter[str] = Counter()
        self._keys: Counter[str] = Counter()
        self._not_read: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()

    def add(
        self,
        row: dict[str, Any],
        values: Collection[str],
        read: Collection[str],
        shape: str,
        names: LogFields,
    ) -> None:
        """Count a line; values: which of our fields it has; read: what it calls the labels that
        were read; shape: "" for our own fields."""
        paths = vars(names).values()
        read = {*read, *paths, *(path.partition(".")[0] for path in paths)}
        self._lines += 1
        self._with.update(list(values))
        if shape:
            self._shapes[shape] += 1
        for key in row:
            if key not in self._keys and len(self._keys) >= _MOST_NAMES:
                continue
            self._keys[key] += 1
            if key not in read and row[key] is not None:
                self._not_read[key] += 1

    def check(self, names: LogFields) -> None:
        """Raise UserError for a field that somebody named and no line has."""
        for ours, theirs in other_names(names).items():
            if not self._with[ours]:
                there = ", ".join(map(named, list(self._keys)[:_NUM_SHOWN])) or "nothing"
                raise UserError(
                    f"--fields.{ours} {named(theirs)}: none of the {self._lines} lines has it; "
                    f"there is {there}"
                )

    def as_object(self) -> dict[str, Any]:
        """Return the counts, as report.json has them."""
        return {
            "lines": self._lines,
            "with_field": dict(sorted(self._with.items())),
            "not_read": {named(k): n for k, n in sorted(self._not_read.items())},
            "read_as": dict(sorted(self._shapes.items())),
        }


def _at(row: dict[str, Any], path: str) -> Any:
    """Return a field's value; a dot leads into an object, where no field has that name."""
    value: Any = row.get(path)
    if value is None and "." in path and path not in row:
        value = row
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    is_nan = isinstance(value, float) and math.isnan(value)
    return None if is_nan else value
