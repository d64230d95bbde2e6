"""Values of a config that mean nothing or fit nowhere, refused by the field's option."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError, quoted

MAX_EPOCHS = 1e9
"""Our choice: the steps of so many epochs are a whole number that Python can still count."""
_MAX_INT = 2**62  # our choice: what steps, stages and ranks add to a seed keeps it within 64 bits
_MAX_TEXT = 1 << 16  # characters; our choice: more is a file
_MAX_PATH_BYTES = 3072  # of the 4096 that Linux takes: what lies below a folder has the others


def option_of(name: str) -> str:
    """Return the option of a field, by its dotted name."""
    return f"--{name.replace('_', '-')}"


def check_numbers(
    config: object,
    prefix: str = "",
    *,
    counts: str = "",
    positive: str = "",
    not_negative: str = "",
    shares: str = "",
) -> None:
    """Raise UserError for a field of a config whose number means nothing; None means none.

    The names of fields are separated by spaces: counts are at least 1, shares from 0 to 1, and all
    are finite.
    """
    rules: list[tuple[str, Callable[[float], bool], str]] = [
        (counts, lambda value: value >= 1, "at least 1"),
        (positive, lambda value: value > 0, "positive"),
        (not_negative, lambda value: value >= 0, "at least 0"),
        (shares, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ]
    for names, holds, wanted in rules:
        for name in names.split():
            value, said = getattr(config, name), f"{prefix}{name}"
            if not prefix.endswith(" "):  # else whose it is, of an option that may be of several
                said = option_of(said)
            if value is not None and not holds(value):  # NaN keeps no rule
                raise UserError(f"{said} must be {wanted}, got {quoted(value)}")
            if value == math.inf:
                raise UserError(f"{said} must be finite, got {value}")


def check_epochs(epochs: float) -> None:
    """Raise UserError for epochs whose steps are too many to be counted."""
    if epochs > MAX_EPOCHS:
        raise UserError(f"--epochs must be at most {MAX_EPOCHS:g}, got {epochs}")


def check_values(value: Any, name: str = "", *, nameless: tuple[str, ...] = ()) -> None:
    """Raise UserError for what no run could hold, by its option.

    That are NaN, infinity and numbers over 62 bits, texts that are not Unicode or very
    long, and what can be no path. The parts `nameless` are left out of names.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            is_nameless = field.name in nameless and dataclasses.is_dataclass(part)
            inner = name if is_nameless else f"{name}.{field.name}".lstrip(".")
            check_values(part, inner, nameless=nameless)
    elif isinstance(value, tuple | list):
        for item in value:
            check_values(item, name)
    else:
        problem = _problem(value)
        if problem is not None:
            shown = quoted(str(value) if isinstance(value, Path) else value)
            raise UserError(f"{option_of(name)} {problem}, got {shown}")


def _problem(value: Any) -> str | None:
    if isinstance(value, float) and not value < math.inf:  # -inf is a limit that never holds
        return "must be finite"
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        return "must be within 2^62"
    if not isinstance(value, str | Path):
        return None
    text = str(value)
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8, half of a surrogate
        return "must be valid UTF-8"
    if len(text) > _MAX_TEXT:
        return f"must have at most {_MAX_TEXT} characters"
    if isinstance(value, Path) and ("\0" in text or num_bytes > _MAX_PATH_BYTES):
        return f"must be a path, of at most {_MAX_PATH_BYTES} bytes and without NULs"
    # An option for data may be a list of paths, with commas between them.
    parts = text.replace("/", ",").split(",") if isinstance(value, Path) else []
    if any(len(os.fsencode(part)) > 255 for part in parts):
        return "must be a path of names of at most 255 bytes"
    return None
