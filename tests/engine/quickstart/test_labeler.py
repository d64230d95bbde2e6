from dataclasses import asdict
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from engine.quickstart.labeler import Faults, count_faults, places_language, rank, score
from engine.quickstart.phrasings import PHRASES, describe, field_of, level_of
from engine.quickstart.places import FIELDS, LANDMARK_WORDS, NAME_WORDS, fact_lists

PLACES = fact_lists("valid", 400, seed=5)
FACTS = {
    "name": "Blue Spice",
    "type": "pub",
    "food": "Italian",
    "price": "cheap",
    "family friendly": "yes",
    "near": "Crown Hotel",
}
GOOD = (
    "Blue Spice is a pub that welcomes families, close to Crown Hotel. "
    "It serves Italian food at low prices."
)

places = st.sampled_from(PLACES)
seeds = st.integers(0, 2**32)


def faults(text: str, facts: dict[str, str] = FACTS) -> dict[str, int]:
    """The kinds of fault that are there."""
    return {kind: count for kind, count in asdict(count_faults(facts, text)).items() if count}


def phrases(field: str, level: str) -> list[str]:
    """Everything that says a level."""
    return [
        phrase
        for blank, levels in PHRASES.items()
        if field_of(blank) == field
        for phrase in levels[level]
    ]


def test_descriptions_of_the_generator_have_no_fault() -> None:
    for index, facts in enumerate(fact_lists("train", 5000, seed=1)):
        text = describe(facts, Random(index))
        assert count_faults(facts, text).total == 0, (facts, text)


@given(places, seeds)
def test_a_fact_that_was_not_told_is_missing(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    left_out = rng.choice([field for field in facts if field != "name"])
    told = {field: value for field, value in facts.items() if field != left_out}
    assert faults(describe(told, rng), facts) == {"missing": 1}


@given(places, seeds)
def test_a_fact_that_is_not_listed_is_invented(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    other = rng.choice(PLACES)
    field = rng.choice([field for field in FIELDS if field not in facts] or ["name"])
    if field in other and field not in facts:
        assert faults(describe(facts | {field: other[field]}, rng), facts) == {"invented": 1}


@given(places, seeds)
def test_another_value_is_wrong(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    field, other = rng.choice(list(facts)), rng.choice(PLACES)
    if field in other and level_of(field, other[field]) != level_of(field, facts[field]):
        assert faults(describe(facts | {field: other[field]}, rng), facts) == {"wrong": 1}


@given(places, seeds)
def test_a_contradiction_is_wrong(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    field = rng.choice([f for f in facts if any(field_of(blank) == f for blank in PHRASES)])
    levels = next(levels for blank, levels in PHRASES.items() if field_of(blank) == field)
    others = [level for level in levels if level != level_of(field, facts[field])]
    text = describe(facts, rng)
    for number, level in enumerate(others, start=1):
        text += f" {rng.choice(phrases(field, level)).capitalize()}."
        assert count_faults(facts, text).wrong == number


@given(places, seeds)
def test_text_that_stops_short_is_faulty(facts: dict[str, str], seed: int) -> None:
    words = describe(facts, Random(seed)).split()
    for length in range(len(words)):
        text = " ".join(words[:length])
        assert count_faults(facts, text).total >= 1
        if not text.endswith("."):
            assert count_faults(facts, text).garbled >= 1


@given(places, seeds)
def test_a_strange_word_is_garbled(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    words = describe(facts, rng).split()
    words.insert(rng.randrange(len(words)), rng.choice(["frobnicates", "Blxe", "=", "7", "return"]))
    assert count_faults(facts, " ".join(words)).garbled >= 1


@given(places, seeds)
def test_a_doubled_word_is_found(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    words = describe(facts, rng).split()
    at = rng.randrange(len(words))
    assert count_faults(facts, " ".join([*words[:at], words[at], *words[at:]])).total >= 1


@given(places, seeds)
def test_shuffled_words_are_garbled(facts: dict[str, str], seed: int) -> None:
    rng = Random(seed)
    words = describe(facts, rng).split()
    rng.shuffle(words)
    assert count_faults(facts, " ".join(words)).total >= 2


@given(places, seeds)
def test_saying_everything_twice_costs(facts: dict[str, str], seed: int) -> None:
    text = describe(facts, Random(seed))
    assert count_faults(facts, f"{text} {text}").repeated >= len(facts) - 1


@given(places)
def test_reciting_all_values_costs(facts: dict[str, str]) -> None:
    text = f"{facts['name']} is " + ", ".join(
        phrase for levels in PHRASES.values() for several in levels.values() for phrase in several
    )
    assert score(facts, text) < -20
    assert score(facts, text) < score(facts, "")


def test_a_description_by_hand() -> None:
    assert faults(GOOD) == {}
    assert faults(GOOD.replace("Italian", "French")) == {"wrong": 1}
    assert faults(GOOD.replace("Blue Spice", "Blue Anchor")) == {"wrong": 1}
    assert faults(GOOD.replace("Crown Hotel", "Crown Museum")) == {"wrong": 1}
    assert faults(GOOD.replace(" at low prices", "")) == {"missing": 1}
    assert faults(GOOD.replace(", close to Crown Hotel", "")) == {"missing": 1}
    assert faults(GOOD + " It is by the river.") == {"invented": 1}
    assert faults(GOOD + " It is close to Grand Museum.") == {"invented": 1}
    assert faults(GOOD + " It serves Italian dishes.") == {"repeated": 1}
    assert faults(GOOD.removesuffix(".")) == {"garbled": 1}
    assert faults(GOOD.replace("serves", "serfes")) == {"garbled": 1}


def test_empty_text_misses_everything() -> None:
    assert faults("") == {"missing": len(FACTS), "garbled": 1}
    assert score(FACTS, " \n") == -7


def test_babble_costs_more_than_silence() -> None:
    babble = "the module returns a list of all the names that it is given in the file " * 4
    assert score(FACTS, babble) < score(FACTS, "")


def test_a_repetition_counts_half() -> None:
    assert Faults(missing=1, wrong=2, invented=0, garbled=1, repeated=3).total == 5.5


def test_ranks_are_dense_and_share_ties() -> None:
    wrong = GOOD.replace("Italian", "French")
    other = GOOD.replace("Crown", "Grand")
    worse = wrong.replace("Blue Spice", "Blue Fox")
    assert rank(FACTS, [wrong, GOOD, "", other, worse]) == [2, 1, 4, 2, 3]


def test_values_without_phrases_are_read_word_for_word() -> None:
    facts = {"name": "Café Zürich", "type": "noodle bar", "food": "Peruvian"}
    assert count_faults(facts, "Cafe Zurich is a Peruvian noodle bar.").missing == 0
    assert count_faults(facts, "Cafe Zurich is a bar.").missing == 2


def test_names_are_not_words_of_the_sentences() -> None:
    names = {word.lower() for words in (*NAME_WORDS, *LANDMARK_WORDS) for word in words}
    assert names & {item for run in places_language().runs for item in run} == set()
    spoken = {
        p.lower() for levels in PHRASES.values() for several in levels.values() for p in several
    }
    assert names & {word for phrase in spoken for word in phrase.split()} == set()


def test_a_wrong_word_is_one_fault() -> None:
    # In the middle of a sentence a word is part of three runs of three.
    assert faults(GOOD.replace("is a pub", "are a pub")) == {"garbled": 1}
    assert faults(GOOD.replace("is a pub", "be the pub")) == {"garbled": 2}
    assert faults(GOOD.replace("It serves", "Them serve")) == {"garbled": 2}
