"""One field of a config.json, read with its bounds, and named where it is wrong. Imports neither
torch nor megatron."""

import math
from collections.abc import Mapping
from typing import Any

_LARGEST = 1 << 24  # of any size in a config.json; our choice: a hundred times those of any model
_LARGEST_FLOAT = 1 << 40  # as models/form.py has it
_MOST_SHOWN = 60  # characters of a value of config.json in an error; our choice


def shown(value: Any) -> str:
    """Return a value of config.json in a few characters."""
    return f"{value!r:.{_MOST_SHOWN}}"


def whole_number(config: Mapping[str, Any], name: str) -> int:
    """Return a number of layers, dimensions, tokens or the like; raises ValueError."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {shown(value)} and must be a whole number from 1 to {_LARGEST}"
        )
    return value


def positive(name: str, value: Any, *, at_least: float = 0.0) -> float:
    """Return a number above zero, and not below at_least; raises ValueError."""
    is_number = type(value) in (int, float) and 0 < value < _LARGEST_FLOAT
    if not is_number or not math.isfinite(value) or value < at_least:
        bound = f"from {at_least:g}" if at_least else "above 0"
        raise ValueError(f"{name} is {shown(value)} and must be a number {bound}")
    return float(value)
