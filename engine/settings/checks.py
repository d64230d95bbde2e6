"""Numbers of a config that mean nothing, refused by the field's name."""

import math
from collections.abc import Callable

from engine.errors import UserError


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
            value = getattr(config, name)
            if value is not None and not holds(value):  # NaN keeps no rule
                raise UserError(f"{prefix}{name} must be {wanted}, got {value}")
            if value == math.inf:
                raise UserError(f"{prefix}{name} must be finite, got {value}")
