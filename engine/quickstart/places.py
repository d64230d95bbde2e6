"""Invented places as lists of facts, and demonstrations of the instruction to describe them.

    Describe this place. name: Blue Spice | type: pub | food: Italian | price: cheap

Fields and form are those of the E2E data (Novikova et al. 2017), so one labeler judges both. A
place belongs to the split that its name falls into: no name, and so no fact list, is in two.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from random import Random
from typing import Literal

from engine.quickstart.phrasings import PHRASES, describe

Split = Literal["train", "prompts", "valid"]

FIELDS = ("name", "type", "food", "price", "rating", "area", "family friendly", "near")
INSTRUCTION = "Describe this place."

_NAME_WORDS = (
    "Blue Golden Silver Copper Velvet Hungry Lucky Royal "
    "Gentle Dancing Hidden Olive Ginger Willow Lemon Thistle",
    "Spice Anchor Kettle Lantern Spoon Garden Swan Fox "
    "Lion Heron Badger Cellar Mill Orchard Castle Dragon",
)
LANDMARKS = (
    "Grand Hotel",
    "Central Museum",
    "Victoria Theatre",
    "Trinity Bridge",
    "Palace Cinema",
    "Crown Library",
)
NAME_WORDS = tuple(words.split() for words in _NAME_WORDS)
LANDMARK_WORDS = tuple(list(words) for words in zip(*map(str.split, LANDMARKS), strict=True))

# How often a fact is given; the name always is. A place has about five of the eight.
_PRESENCE = {"name": 1.0, "type": 0.8, "food": 0.7, "price": 0.5, "rating": 0.5}
_PRESENCE |= {"area": 0.5, "family friendly": 0.4, "near": 0.4}
# No two fields share a word: "high" as a price and as a rating takes a small model long to part.
_VALUES = {field: tuple(PHRASES[field]) for field in ("type", "food", "area")} | {
    "price": ("cheap", "moderate", "expensive"),
    "rating": ("poor", "average", "excellent"),
    "family friendly": ("yes", "no"),
    "near": LANDMARKS,
}
_MIN_FACTS = 3


def fact_lists(split: Split, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`count` different places of a split: field to value, in the order of FIELDS."""
    places: dict[str, dict[str, str]] = {}
    for facts in _endless_facts(split, seed):
        places.setdefault(render_facts(facts), facts)
        if len(places) >= count:
            break
    return list(places.values())[:count]


def demonstrations(split: Split, count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, description) of `count` places, each described once and without a fault."""
    return [
        (render_facts(facts), describe(facts, Random(f"describe/{seed}/{split}/{index}")))
        for index, facts in enumerate(fact_lists(split, count, seed=seed))
    ]


def render_facts(facts: Mapping[str, str]) -> str:
    """The instruction to describe the place."""
    listed = " | ".join(f"{field}: {facts[field]}" for field in FIELDS if field in facts)
    return f"{INSTRUCTION} {listed}"


def parse_facts(prompt: str) -> dict[str, str]:
    """The facts that a prompt lists; the inverse of `render_facts`.

    Raises ValueError when the text is no such prompt.
    """
    instruction, found, listed = prompt.strip().partition(INSTRUCTION)
    pairs = [part.partition(":") for part in listed.split("|")]
    facts = {field.strip(): value.strip() for field, _, value in pairs}
    if instruction or not found or not all(facts.values()) or not facts.keys() <= set(FIELDS):
        raise ValueError(
            f"not a list of facts to describe: {prompt[:80]!r}; "
            f"expected '{INSTRUCTION} field: value | ...' with the fields {', '.join(FIELDS)}"
        )
    return facts


def split_of(name: str) -> Split:
    """The split of a place: a hash of its name gives 60 % train, 30 % prompts, 10 % valid."""
    draw = int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if draw < 0.6 else "prompts" if draw < 0.9 else "valid"


def _endless_facts(split: Split, seed: int) -> Iterator[dict[str, str]]:
    rng = Random(f"facts/{seed}/{split}")
    while True:
        place = {"name": " ".join(map(rng.choice, NAME_WORDS))}
        place |= {field: rng.choice(values) for field, values in _VALUES.items()}
        facts = {field: place[field] for field in FIELDS if rng.random() < _PRESENCE[field]}
        if len(facts) >= _MIN_FACTS and split_of(facts["name"]) == split:
            yield facts
