import re
from collections import Counter
from itertools import combinations
from random import Random

import pytest

from engine.quickstart.phrasings import (
    MAX_SENTENCES,
    PHRASES,
    describe,
    field_of,
    level_of,
    sentence_forms,
)
from engine.quickstart.places import FIELDS

FACTS = {
    "name": "Blue Spice",
    "type": "coffee shop",
    "food": "Italian",
    "price": "high",
    "rating": "1 out of 5",
    "area": "riverside",
    "family friendly": "no",
    "near": "Crown Hotel",
}


def test_a_phrase_says_one_thing() -> None:
    said = Counter(
        phrase for levels in PHRASES.values() for phrases in levels.values() for phrase in phrases
    )
    assert [phrase for phrase, times in said.items() if times > 1] == []


def test_every_blank_says_every_level_of_its_field() -> None:
    levels: dict[str, set[str]] = {}
    for blank, table in PHRASES.items():
        assert levels.setdefault(field_of(blank), set(table)) == set(table), blank


@pytest.mark.parametrize("num_facts", range(1, len(FIELDS) + 1))
def test_every_set_of_facts_can_be_described(num_facts: int) -> None:
    for others in combinations(FIELDS[1:], num_facts - 1):
        facts = {field: FACTS[field] for field in ("name", *others)}
        text = describe(facts, Random(0))
        assert text.count("Blue Spice") == 1
        assert text.count("Crown Hotel") == ("near" in facts)
        assert 1 <= text.count(".") <= MAX_SENTENCES


def test_one_place_has_many_descriptions() -> None:
    texts = [describe(FACTS, Random(seed)) for seed in range(500)]
    assert len(set(texts)) > 490
    assert len({" ".join(text.split()[:2]) for text in texts}) > 10
    assert describe(FACTS, Random(3)) == texts[3]


def test_forms_are_spelled_out() -> None:
    forms = sentence_forms()
    assert len(forms) > 1000
    words = {part for form in forms for part in form.parts if not part.startswith("{")}
    assert all(re.fullmatch(r"[A-Za-z-]+|,", word) for word in words)
    assert all(form.is_opening == ("name" in form.fields) for form in forms)
    blanks = {part[1:-1] for form in forms for part in form.parts if part.startswith("{")}
    assert blanks == {*PHRASES, "name", "near"}


def test_article_agrees() -> None:
    texts = " ".join(describe(FACTS, Random(seed)) for seed in range(300))
    assert "an Italian" in texts and "an expensive" in texts and "a one-star" in texts
    assert not re.search(r"\b[Aa] [aeiu]|\ban [^aeioEI]", texts)


def test_levels() -> None:
    assert level_of("rating", "5 out of 5") == "high"
    assert level_of("price", "less than £20") == "cheap"
    assert level_of("area", "riverside") == "riverside"
