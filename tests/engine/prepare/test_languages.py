import sys

import pytest

from engine.errors import UserError
from engine.prepare.languages import UNDETERMINED, open_languages


def test_sentences_have_their_language_and_what_is_none_has_none():
    language = open_languages()
    assert language("What is the best way to learn how to play the piano?") == "en"
    assert language("Schreibe ein Gedicht über den Herbst und den Wind") == "de"
    assert language("Écris une lettre à mon propriétaire pour le loyer") == "fr"
    assert language("what is this") == "en"
    assert language("안녕하세요") == "ko"
    for text in ("12345", "x=x=x=x", "Hi", "ok", "hello there", "yes please", "lol", "你好", ""):
        assert language(text) == UNDETERMINED, text


def test_a_library_that_is_not_installed_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match=r"py3langid is not installed.*'trident\[prepare\]'"):
        open_languages()
