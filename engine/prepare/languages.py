"""In which language a text is: py3langid, the paper's langid.py kept up, whose model it brings."""

from collections.abc import Callable

from engine.errors import UserError

UNKNOWN = "unknown"
"""Of a text that says nothing of its language: a word or two, numbers, code."""
_NO_LANGUAGE = "zxx"  # ISO 639-3's code
_LEAST_SCORE = -1e30  # the library's floor, of a text without a feature, is -3e38


def open_languages() -> Callable[[str], str]:
    """Return what says the language of a text, as ISO 639-1 has it. Raises UserError where the
    library is not installed."""
    try:
        import py3langid
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which languages are counted by: "
            "pip install 'trident[prepare]' (here: '.[prepare]'), or give --no-languages"
        ) from None

    def language(text: str) -> str:
        name, score = py3langid.classify(text)
        return UNKNOWN if name == _NO_LANGUAGE or score < _LEAST_SCORE else str(name)

    return language
