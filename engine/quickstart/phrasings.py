"""How the facts of a place are said in English: the phrases, the sentences, and their mixing.

A sentence is written once as a pattern: `{blank}` stands for a phrase that says a fact, `[...]` may
be left out, `(a|b)` is a choice. Every pattern is spelled out into all its forms when first used,
so that the labeler knows exactly which words may follow which.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random

MAX_SENTENCES = 3

# blank -> level -> phrases. A phrase says one level of one field and belongs to one blank only.
# The field of a blank is the part before the dot; `name` and `near` are said word by word.
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "type": {
        "pub": ("pub", "public house"),
        "restaurant": ("restaurant",),
        "coffee shop": ("coffee shop", "coffee house"),
        "wine bar": ("wine bar",),
        "bakery": ("bakery",),
    },
    "price.adjective": {
        "cheap": ("cheap", "inexpensive", "low-priced"),
        "moderate": ("moderately priced", "mid-priced"),
        "high": ("expensive", "high-priced", "pricey"),
    },
    "price.at": {
        "cheap": ("at low prices", "for little money"),
        "moderate": ("at moderate prices", "for a moderate price"),
        "high": ("at high prices", "for a lot of money"),
    },
    "price.clause": {
        "cheap": ("prices are low", "meals cost little"),
        "moderate": ("prices are moderate", "prices are in the middle range"),
        "high": ("prices are high", "meals cost a lot"),
    },
    "rating.adjective": {
        "low": ("poorly rated", "one-star"),
        "average": ("averagely rated", "three-star"),
        "high": ("highly rated", "five-star"),
    },
    "rating.noun": {
        "low": ("a low customer rating", "a rating of 1 out of 5", "poor reviews"),
        "average": ("an average customer rating", "a rating of 3 out of 5", "mixed reviews"),
        "high": ("a high customer rating", "a rating of 5 out of 5", "excellent reviews"),
    },
    "rating.clause": {
        "low": ("customers rate it poorly", "guests give it 1 out of 5"),
        "average": ("customers rate it as average", "guests give it 3 out of 5"),
        "high": ("customers rate it highly", "guests give it 5 out of 5"),
    },
    "area": {
        "city centre": ("in the city centre", "in the middle of town"),
        "riverside": ("by the river", "in the riverside area"),
        "old town": ("in the old town", "in the old part of town"),
        "harbour": ("at the harbour", "in the harbour area"),
        "station": ("by the station", "beside the railway station"),
    },
    "family friendly.adjective": {
        "yes": ("family-friendly", "child-friendly", "kid-friendly"),
        "no": ("adults-only", "child-free"),
    },
    "family friendly.predicate": {
        "yes": ("good for families", "suitable for children"),
        "no": ("not family-friendly", "not suitable for children"),
    },
    "family friendly.post": {
        "yes": ("that welcomes families", "where children are welcome"),
        "no": ("for adults only", "where children are not welcome"),
    },
    "family friendly.clause": {
        "yes": ("children are welcome", "families are welcome"),
        "no": ("children are not welcome", "families are not welcome"),
    },
}
for _cuisine in ("English", "Italian", "French", "Indian", "Chinese", "Japanese"):
    _nouns = ("food", "dishes", "cuisine")
    PHRASES.setdefault("food", {})[_cuisine] = tuple(f"{_cuisine} {noun}" for noun in _nouns)
    PHRASES.setdefault("food.adjective", {})[_cuisine] = (_cuisine,)

# Values that are said like another one; the prices in pounds occur in the E2E data.
_SAME_AS = {
    ("rating", "1 out of 5"): "low",
    ("rating", "3 out of 5"): "average",
    ("rating", "5 out of 5"): "high",
    ("rating", "poor"): "low",
    ("rating", "excellent"): "high",
    ("price", "expensive"): "high",
    ("price", "less than £20"): "cheap",
    ("price", "£20-25"): "moderate",
    ("price", "more than £30"): "high",
}

_SHORTHANDS = {
    "NEAR": "(near|close to|next to|not far from|a short walk from) {near}",
    "SERVING": "(that serves|serving|offering|which offers) {food}",
    "FIND": "(you will find|you can find|there is)",
    "KIND": "({type}|{type}|place|spot)",
}
# The first sentence names the place.
_OPENINGS = (
    "{name} is a[ {price.adjective}][ {family friendly.adjective}][ {food.adjective}] KIND"
    "[ {area}][ NEAR].",
    "{name} is a[ {rating.adjective}][ {price.adjective}] KIND[ SERVING][ {area}].",
    "{name} is a KIND {family friendly.post}[, NEAR].",
    "{name} is a[ {food.adjective}] KIND with {rating.noun}[ and it is {area}].",
    "There is a[ {price.adjective}][ {food.adjective}] KIND called {name}[ {area}][ NEAR].",
    "There is a[ {rating.adjective}] KIND[ NEAR] called {name}[ SERVING].",
    "(Located|Situated) {area}[ NEAR], {name} is a[ {rating.adjective}] KIND[ SERVING].",
    "{area} FIND {name}, a[ {price.adjective}][ {family friendly.adjective}] KIND[ SERVING].",
    "NEAR[ and {area}] FIND {name}, a[ {rating.adjective}][ {food.adjective}] KIND.",
    "{name} (serves|offers|is known for) {food}[ {price.at}][ {area}].",
    "(For|If you like|If you want) {food}[ {price.at}], (try|go to|visit) {name}[ {area}][ NEAR].",
    "{name}, a[ {rating.adjective}] KIND[ {area}], (serves|offers) {food}[ {price.at}].",
    "With {rating.noun}, {name} is a[ {family friendly.adjective}][ {food.adjective}] KIND.",
    "The[ {family friendly.adjective}] {type} {name} is {area}[ NEAR][ and serves {food}].",
    "(Looking for|If you want) a[ {price.adjective}] {type}[ NEAR][ {area}], (try|visit) {name}.",
)
# Each later sentence adds one to three facts.
_FOLLOWERS = (
    "It (serves|offers) {food}[ {price.at}].",
    "The food is {food.adjective}[ and {price.clause}].",
    "On the menu is {food}[, and {rating.clause}].",
    "It is a {type}[ {area}][ with {rating.noun}].",
    "This {type} (serves|offers) {food}[ and has {rating.noun}].",
    "It is[ located] {area}[ NEAR].",
    "(You will find it|You can find it|Find it) {area}[, NEAR].",
    "It is[ located] NEAR[ and has {rating.noun}].",
    "(You will find it|You can find it|Find it) NEAR.",
    "It has {rating.noun}[ and {price.clause}].",
    "It has {rating.noun}[, and {family friendly.clause}].",
    "{rating.clause}[, and {price.clause}].",
    "{rating.clause}[, {price.clause}] and {family friendly.clause}.",
    "{price.clause}[ and {rating.clause}].",
    "{price.clause}[, and {family friendly.clause}].",
    "{family friendly.clause}[ and {price.clause}].",
    "It is {family friendly.predicate}[ and has {rating.noun}].",
    "The place is {price.adjective}[ and {family friendly.predicate}].",
    "The place is {family friendly.predicate}[, and {price.clause}].",
    "It is {price.adjective}[, {family friendly.predicate}] and {rating.adjective}.",
    "It is {price.adjective}[ and {area}].",
    "It is {rating.adjective}[ and {family friendly.predicate}].",
)


@dataclass(frozen=True)
class SentenceForm:
    """One spelled-out pattern: words, commas and `{blank}`s, without the final full stop."""

    parts: tuple[str, ...]
    is_opening: bool

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the sentence says."""
        return frozenset(field_of(part[1:-1]) for part in self.parts if part.startswith("{"))


def field_of(blank: str) -> str:
    """The field that a blank says: "price" for "price.adjective"."""
    return blank.partition(".")[0]


def level_of(field: str, value: str) -> str:
    """What has to be said for a value: "1 out of 5" is a low rating; most values are themselves."""
    return _SAME_AS.get((field, value), value)


@cache
def sentence_forms() -> tuple[SentenceForm, ...]:
    """All forms of all sentences, openings first."""
    forms = {
        SentenceForm(tuple(re.findall(r"\{[^}]*\}|[\w-]+|,", text)), is_opening): None
        for patterns, is_opening in ((_OPENINGS, True), (_FOLLOWERS, False))
        for pattern in patterns
        for text in _spell_out(pattern)
    }
    return tuple(forms)


def describe(facts: Mapping[str, str], rng: Random) -> str:
    """A description of one to three sentences that says every fact exactly once."""
    fields = frozenset(facts)
    while True:
        remaining = fields
        forms: list[SentenceForm] = []
        while remaining and len(forms) < MAX_SENTENCES:
            choices = _forms_by_fields(is_opening=not forms)
            fitting = [said for said in choices if said <= remaining]
            said = rng.choice(fitting)
            forms.append(rng.choice(choices[said]))
            remaining -= said
        if not remaining:
            return " ".join(_sentence(form, facts, rng) for form in forms)


@cache
def _forms_by_fields(*, is_opening: bool) -> dict[frozenset[str], list[SentenceForm]]:
    table: dict[frozenset[str], list[SentenceForm]] = defaultdict(list)
    for form in sentence_forms():
        if form.is_opening == is_opening:
            table[form.fields].append(form)
    return dict(table)


def _spell_out(pattern: str) -> list[str]:
    """Every text that a pattern allows, from the inside out."""
    for word, meaning in _SHORTHANDS.items():
        pattern = pattern.replace(word, meaning)
    pattern = re.sub(r"\[([^\]]*)\]", r"(|\1)", pattern)
    pending, done = [pattern], []
    while pending:
        text = pending.pop()
        group = re.search(r"\(([^()]*)\)", text)
        if group is None:
            done.append(text)
        else:
            choices = dict.fromkeys(group[1].split("|"))
            pending.extend(
                text[: group.start()] + choice + text[group.end() :] for choice in choices
            )
    return done


def _sentence(form: SentenceForm, facts: Mapping[str, str], rng: Random) -> str:
    words = []
    for part in form.parts:
        if part.startswith("{"):
            blank = part[1:-1]
            value = facts[field_of(blank)]
            table = PHRASES.get(blank)
            words.append(rng.choice(table[level_of(field_of(blank), value)]) if table else value)
        else:
            words.append(part)
    text = " ".join(words).replace(" ,", ",") + "."
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!one-)", r"\1n ", text)
    return text[0].upper() + text[1:]
