"""Texts that people type as options: a backslash and n is a line break.

Imports neither torch nor megatron.
"""

import re
import typing
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_SPELLED = {character: f"\\{letter}" for letter, character in _ESCAPES.items()}


def read_typed(text: str) -> str:
    r"""Return what a typed text means: \n, \t, \r and \\ are one character, all else is as it is
    typed."""
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def as_typed(text: str) -> str:
    """Return a text as it is typed: read_typed(as_typed(text)) == text."""
    return "".join(_SPELLED.get(character, character) for character in text)


TypedText = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: read_typed(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [as_typed(value)],
    ),
]
"""A field's type; a config's file has such a text as it is meant."""


def is_typed(hint: Any) -> bool:
    """Return whether a field's type, with what annotates it, is TypedText, or that or None."""
    return hint == TypedText or TypedText in typing.get_args(hint)
