import json
from collections import Counter
from pathlib import Path

import pytest

from engine.containers.lines import read_lines
from engine.quickstart.e2e_phrases import E2E_PHRASES
from engine.quickstart.labeler import Language, count_faults, e2e_language, score
from engine.quickstart.places import parse_facts

FACTS = {
    "name": "The Wrestlers",
    "type": "pub",
    "price": "less than £20",
    "rating": "5 out of 5",
    "area": "riverside",
    "family friendly": "no",
    "near": "Café Sicilia",
}
PROMPT = "Describe this place. " + " | ".join(f"{field}: {FACTS[field]}" for field in FACTS)
RESPONSE = (
    "Wrestlers is a cheap pub by the river near Cafe Sicilia. "
    "The Wrestlers isn't kid-friendly, but it has 5 stars."
)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for _, line in read_lines(path)]


@pytest.fixture
def language() -> Language:
    return e2e_language([(PROMPT, RESPONSE), ("Describe this place. name: The Mill", "The Mill.")])


@pytest.fixture(scope="module")
def real_language(data_pack: Path) -> Language:
    rows = records(data_pack / "sft" / "e2e.train.jsonl.gz")
    return e2e_language((row["prompt"], row["response"]) for row in rows)


def test_a_phrase_says_one_level_of_its_field() -> None:
    for field, levels in E2E_PHRASES.items():
        said = Counter(phrase for phrases in levels.values() for phrase in set(phrases))
        assert [phrase for phrase, times in said.items() if times > 1] == [], field


def test_peoples_words_are_understood(language: Language) -> None:
    assert count_faults(FACTS, RESPONSE, language).total == 0
    for facts, change, kind in (
        (FACTS, ("a cheap", "an expensive"), "wrong"),
        (FACTS, ("isn't kid-friendly", "is kid-friendly"), "wrong"),
        (FACTS, ("5 stars", "1 star"), "wrong"),
        (FACTS, ("Cafe Sicilia", "The Mill"), "wrong"),
        (FACTS, ("by the river ", ""), "missing"),
        (FACTS, ("a cheap pub", "a cheap Italian pub"), "invented"),
        (FACTS, ("but", "butt"), "garbled"),
        (FACTS, ("a cheap pub", "a cheap pub, a pub"), "repeated"),
    ):
        faults = count_faults(facts, RESPONSE.replace(*change), language)
        assert getattr(faults, kind) == 1, (change, faults)


def test_human_references_are_mostly_faultless(data_pack: Path, real_language: Language) -> None:
    rows = records(data_pack / "sft" / "e2e.val.jsonl.gz")
    totals = [
        count_faults(parse_facts(row["prompt"]), row["response"], real_language).total
        for row in rows
    ]
    # Measured 0.76 and 0.94. Most of the rest truly say more or other than their facts.
    assert sum(total == 0 for total in totals) > 0.72 * len(totals)
    assert sum(total <= 1 for total in totals) > 0.90 * len(totals)


def test_it_agrees_with_the_ranking_of_references(data_pack: Path, real_language: Language) -> None:
    verdicts: Counter[bool] = Counter()
    for row in records(data_pack / "comparisons" / "e2e_slots.val.jsonl.gz"):
        facts = parse_facts(row["prompt"])
        judged = [
            (rank, score(facts, text, real_language))
            for rank, text, kind in zip(row["ranks"], row["completions"], row["kinds"], strict=True)
            if kind == "reference"
        ]
        for rank, points in judged:
            for other_rank, other_points in judged:
                if rank < other_rank and points != other_points:
                    verdicts[points > other_points] += 1
    assert verdicts[True] > 0.94 * verdicts.total()  # measured 0.97
