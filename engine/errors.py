"""The user's mistakes, said in words, and what such words quote of the user's data."""

import reprlib


class UserError(Exception):
    """A mistake of the user's: a file, a line, a field or an option, said in a line or a few."""


def cut(text: str, limit: int = 80) -> str:
    """Return a text's beginning and end where it has over `limit` characters, and how many."""
    if len(text) <= limit:
        return text
    first, last = limit - limit // 3, limit // 3
    return f"{text[:first]}[... {len(text)} characters ...]{text[len(text) - last :]}"


def named(name: object, limit: int = 80) -> str:
    """Return a key, a path or another name as an error has it: cut, on one line, and as repr()
    writes it where it holds what does not print."""
    text = cut(str(name), limit)
    return text if text.isprintable() else repr(text)


def quoted(value: object, limit: int = 80) -> str:
    """Return a value as an error quotes it: its repr, cut, and made of no more than is shown.

    So neither a value of 50 MB nor one that is nested too deeply for repr() takes memory or fails.
    """
    try:
        return cut(_SHORT.repr(value), limit)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3
