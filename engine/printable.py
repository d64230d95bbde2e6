"""What reaches a terminal, a log or a page: text of files, models and command lines, made harmless.

Such text may hold sequences that a terminal obeys: they set its clipboard or clear its screen.
Other characters turn the direction of reading, or nobody sees them. All are shown as Python would
write them, `\\x1b`. Everything that engine/ prints goes through say() or open_console(). Files for
machines keep their text as it is.

Imports rich only where a console is asked for.
"""

import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

ERROR_CHARACTERS = 4000
"""The most of an error that is shown, our choice: more than any of ours has."""
TRACEBACK_CHARACTERS = 40_000
"""The most of a traceback, our choice: hundreds of lines, first and last."""
TERMINAL_COLUMNS = 79
"""Of the narrowest terminal that lines are broken for."""

_CANDIDATE = re.compile(r"[^\n\t -~]")
# Invisible, yet a part of words and emoji: non-joiner, joiner, Mongolian vowel separator.
JOINERS = "\u200c\u200d\u180e"
# Invisible, and change the look of the character before them: variation selectors and the
# grapheme joiner.
_SELECTORS = frozenset(
    map(chr, (0x34F, 0x180B, 0x180C, 0x180D, 0x180F, *range(0xFE00, 0xFE10)))
) | frozenset(map(chr, range(0xE0100, 0xE01F0)))
# Of the category of format characters, but visible: Arabic, Syriac and Kaithi number marks.
_VISIBLE = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")
_VISIBLE |= frozenset("\U000110bd\U000110cd")
# Letters and marks by category that show nothing: Hangul fillers, two Khmer vowels.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u17b4\u17b5")


def command_lines(begin: str, *options: str) -> list[str]:
    """Return a command in lines of a terminal's width, which a shell reads as one; no line parts an
    option, which is quoted, from its value."""
    lines = [begin]
    for option in options:
        if len(lines[-1]) + len(option) + 3 > TERMINAL_COLUMNS:
            lines[-1] += " \\"
            lines.append(f"    {option}")
        else:
            lines[-1] += f" {option}"
    return lines


def short_number(value: float) -> str:
    """Four digits, as 0.0001235; all before the point where there are more, as 10,350, below a
    thousand millions."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def printable(text: str, *, limit: int | None = None, one_line: bool = False) -> str:
    """Return a text in which nothing is hidden, and nothing is a command to a terminal.

    Escaped are characters of control, direction, format and tags, and blank ones that are no space.
    So are separators of lines and paragraphs, halves of surrogate pairs, and what is private or
    unassigned. Tabs and newlines stay, unless it is to be `one_line`. A joiner stays between two
    characters beyond ASCII, as in emoji and Persian words, and a variation selector after one. A
    backslash stays itself: a text that spelled `\\x1b` looks like one that held it.

    limit: the most characters that come back; the middle is left out, and replaced by how many of
    the text's characters it had. The same again changes nothing.
    """
    if limit is not None and len(text) > limit:
        # A character is shown by one or more: no more than `limit` of either end can be needed.
        head, tail = text[:limit], text[len(text) - limit :]
        return _cut(_pieces(head, one_line), _pieces(tail, one_line), len(text), limit)
    pieces = _pieces(text, one_line)
    shown = "".join(pieces)
    if limit is None or len(shown) <= limit:
        return shown
    return _cut(pieces, pieces, len(text), limit)


def say(
    text: str, *, stream: TextIO | None = None, limit: int | None = None, end: str = "\n"
) -> None:
    """Print a text so that it is printable, on a stream of any encoding, at once.

    stream: stdout by default; limit: the most characters.
    """
    stream = stream or sys.stdout
    accept_any_text(stream)
    print(printable(text, limit=limit), end=end, file=stream, flush=True)


def open_console(**options: Any) -> "Console":
    """Return rich's console on stdout, for text that has gone through printable(): it takes neither
    brackets nor colons for commands of its own, whatever the encoding.

    A file or a pipe gets no colours and no bars, even where FORCE_COLOR is set: a log is to be read
    and searched.
    """
    from rich.console import Console

    accept_any_text(sys.stdout)
    is_terminal = None if sys.stdout.isatty() else False
    options = {"force_terminal": is_terminal, **options}
    return Console(markup=False, emoji=False, highlight=False, **options)


def accept_any_text(stream: TextIO) -> None:
    """Have a stream write what its encoding lacks as an escape, such as `\\u2026` in ASCII, where
    it would raise UnicodeEncodeError."""
    reconfigure = getattr(stream, "reconfigure", None)  # what notebooks put there has none
    # By surrogateescape, which the C locale has, half of a surrogate pair would be a raw byte.
    if reconfigure is not None and stream.errors in ("strict", "surrogateescape"):
        reconfigure(errors="backslashreplace")


def _pieces(text: str, one_line: bool) -> list[str]:
    """Return what shows each character of a text."""
    pieces = list(text)
    for match in _CANDIDATE.finditer(text):
        index = match.start()
        if not _is_shown_as_it_is(text, index):
            pieces[index] = _escape(text[index])
    if one_line:
        pieces = [_escape(piece) if piece in ("\n", "\t") else piece for piece in pieces]
    return pieces


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_shown_as_it_is(text: str, index: int) -> bool:
    """Return whether the character there, not one of ASCII that prints, may be shown."""
    character = text[index]
    if character in JOINERS:
        is_joining = _is_beyond_ascii(text, index - 1) and _is_beyond_ascii(text, index + 1)
        return is_joining and text[index + 1] not in _SELECTORS
    if character in _SELECTORS:
        before = text[index - 1] if index else ""
        is_key = before != "" and before in "0123456789#*"  # of a keypad, as an emoji
        return is_key or (_is_beyond_ascii(text, index - 1) and before not in _SELECTORS)
    if character in _BLANK:
        return False
    # Python's own word for it knows no space but that of ASCII.
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in _VISIBLE


def _is_beyond_ascii(text: str, index: int) -> bool:
    """Return whether there is a character there, none of ASCII, that shows or changes what does."""
    if not 0 <= index < len(text) or text[index] < "\x80" or text[index] in JOINERS:
        return False
    return text[index].isprintable() and _is_shown_as_it_is(text, index)


def _cut(head: list[str], tail: list[str], num_characters: int, limit: int) -> str:
    """Return the beginning and the end of a text that has so many characters, `limit` in all."""
    # The longest note there can be, so that a text of one length is always cut alike.
    room = max(0, limit - len(_note(num_characters)))
    first = _num_fitting(head, room - room // 3)
    last = _num_fitting(tail[::-1], room // 3)
    # What was shown for its neighbour's sake has none at the cut.
    while first and head[first - 1] in JOINERS:
        first -= 1
    while last and tail[-last] in _SELECTORS.union(JOINERS):
        last -= 1
    end = "".join(tail[len(tail) - last :])
    shown = "".join(head[:first]) + _note(num_characters - first - last) + end
    return shown[:limit]  # where not even the note has room


def _note(num_characters: int) -> str:
    return f" [... {num_characters} characters ...] "


def _num_fitting(pieces: list[str], room: int) -> int:
    """Return how many of the pieces, from the first on, have room together."""
    for number, piece in enumerate(pieces):
        room -= len(piece)
        if room < 0:
            return number
    return len(pieces)
