"""Texts in which two tokenizers that are not the same come apart: spaces, marks, scripts, emoji."""

import itertools
import unicodedata
from collections.abc import Iterator

_WORDS = (
    "The Mill is a cheap pub near the river.",
    "It's £12.50 -- isn't it? “Yes” … naïve café, Straße, İstanbul",
    "漢字 かな カタカナ 한글 Русский Ελληνικά ～ 、。",
    "العربية עברית हिन्दी ไทย Tiếng Việt",
    "🙂👩\u200d👩\u200d👧 ☃\ufe0f \U00012345",
    "def f(x_1):\n\treturn {'a': [x_1 ** 2]}  # 3.14e-10\r\n",
    "ＡＢＣ ①Ⅱ \ufb01ne ½ ™ ｶﾞ ﾊﾟ",
    "<0x0A> <unk> <s> </s> [MASK] \u2047 \ufffd",
)
_BETWEEN = ("", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2581", "\u200b", "\0")

# All of most scripts but those four, whose use Unicode discourages: NFC alone takes them apart.
_DISCOURAGED = "\u0344\u0f73\u0f75\u0f81"
_CHARACTERS = sorted({*map(chr, (*range(1, 0x3100), *range(0xFE00, 0xFFFE)))} - {*_DISCOURAGED})


def hard_texts() -> Iterator[str]:
    """Yield some thousand texts of some hundred characters."""
    yield from ("", " ", "a", " a", "a ", "\n", " \n ", "\u2581", "\u2581a", "a\u2581 \u2581b")
    for (one, other), between in itertools.product(itertools.product(_WORDS, _WORDS), _BETWEEN):
        yield f"{one}{between}{other}"
    for word in _WORDS:
        yield from (unicodedata.normalize("NFD", word), unicodedata.normalize("NFKD", word))
        yield from (unicodedata.normalize("NFC", word), unicodedata.normalize("NFKC", word))
    for word, edge in itertools.product(_WORDS, _BETWEEN):
        yield f"{edge}{word}{edge}"
        yield edge.join(word)
    for character in _CHARACTERS:
        yield f"a{character}b {character}{character}"
    for count in range(2, 40):
        yield from ("a" * count, " " * count, "=" * count + "x", "\n" * count, "ab " * count)
