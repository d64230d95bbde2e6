"""JSON that is nearly as it should be, and what a reader may make of it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import strategies as st

from engine.errors import UserError

_Found = TypeVar("_Found")
_HUGE = [10**12, 2**63, 10**400, -1, 1e308, float("nan"), float("inf"), True]
_WORDS = [
    "",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "F32",
    "x" * 3000,
    "\x1b]52;c;",
    "weights-00000.safetensors",
]
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(_HUGE)
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(_WORDS)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(_WORDS), inner, max_size=3)
    ),
    max_leaves=5,
)


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in inner:
        yield from _paths(item, (*path, key))


@st.composite
def near(draw: st.DrawFn, good: Any) -> Any:
    """Draw a value of which one to three parts are others, gone, or under another name."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(value))
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        parent = value
        for name in parents:
            parent = parent[name]
        match draw(st.integers(0, 4)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(st.sampled_from(_WORDS))] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            case _:
                parent[key] = draw(_VALUES)
    return value


def refused_or_read(read: Callable[[], _Found]) -> _Found | None:
    """Return what a reader returns, None where it refuses in a few short lines."""
    try:
        return read()
    except UserError as error:
        assert len(str(error).splitlines()) <= 3
        assert len(str(error)) < 2_000
        return None
