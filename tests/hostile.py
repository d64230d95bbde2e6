"""Text as somebody might write it who wants a terminal, a log or a page to obey or to deceive."""

import unicodedata

COMMANDS = (
    "\x1b]52;c;T1dORUQ=\x1b\\",  # sets the clipboard
    "\x1b]52;c;T1dORUQ=\x07",
    "\x1b]0;title\x1b\\",
    "\x1b[2J\x1b[H",  # clears the screen
    "\x9b2J",
    "\x9d52;c;T1dORUQ=\x9c",
    "\u202egpj.exe\u202c",  # read from right to left
    "\u2066\u2069\u200e\u200f\u061c",
    "\x08\x08\x08",
    "\rover the line",
    "\x0b\x0c\x85",
    "\u2028\u2029",
    "\udcff\ud800",
    "\x00\x7f",
    "\u200b\u2060\ufeff\u00ad",
    "\U000e0001\U000e0041\U000e007f",
)
EVERYTHING = "".join(COMMANDS)


def dangers(text: str) -> list[str]:
    """Return the characters of a text that ought to have been escaped: all control and format
    characters but newline, tab and joiners, separators of lines, and half surrogate pairs."""
    visible = "\u200c\u200d\u180e\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
    spared = f"\n\t{visible}\U000110bd\U000110cd"
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return [c for c in text if unicodedata.category(c) in hidden and c not in spared]
