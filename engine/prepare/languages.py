"""In which language a text is: py3langid, the paper's langid.py kept up, whose model it brings."""

import itertools
from collections.abc import Callable

from engine.errors import UserError

UNDETERMINED = "undetermined"
"""Of a text that is too short to say, or of numbers or code."""
FEWEST_LETTERS = 4
"""Of a text whose language is said; our choice: "hi" or "ok" says nothing to a model of letters."""
LEAST_CONFIDENCE = 0.5
"""Of a language that is said: py3langid's probability, which it tempers by the text's length. Our
choice: below it, short English is Zulu, Sotho or Catalan as often as English."""
_MOST_CHARACTERS = 500  # of a text that are looked at; our choice: of so many it is sure
_NO_LANGUAGE = "zxx"  # ISO 639-3's code


def open_languages() -> Callable[[str], str]:
    """Return what says the language of a text, as ISO 639 has it. Raises UserError where the
    library is not installed."""
    try:
        from py3langid import langid
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which languages are counted by: "
            "pip install 'trident[prepare]' (here: '.[prepare]'), or give --no-languages"
        ) from None
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

    def language(text: str) -> str:
        text = text[:_MOST_CHARACTERS]
        letters = itertools.islice(filter(str.isalpha, text), FEWEST_LETTERS)
        if sum(1 for _ in letters) < FEWEST_LETTERS:
            return UNDETERMINED
        name, confidence = identifier.classify(text)
        is_sure = name != _NO_LANGUAGE and confidence >= LEAST_CONFIDENCE
        return str(name) if is_sure else UNDETERMINED

    return language
