"""The scripted labeler: it counts the faults of a description and ranks descriptions by them.

A description is read phrase by phrase. What the phrases say is compared with the facts (missing,
wrong, invented, repeated); the words between them must stand as they do in fluent descriptions
(garbled). So reciting all values, contradicting oneself, rambling on and stopping short all cost.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby, pairwise

from engine.quickstart import e2e_phrases, phrasings
from engine.quickstart.phrasings import field_of, level_of, sentence_forms
from engine.quickstart.places import LANDMARK_WORDS, NAME_WORDS, parse_facts

Words = tuple[str, ...]

_OTHER_PLACE = "<other place>"  # the blank of a name that is not in the fact list
_FIRST, _LATER, _UNFINISHED = "<first>", "<later>", "<unfinished>"  # around a sentence's words
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)?|£\d+|[^\s-]")  # hyphens part words
_FULL_STOPS = frozenset(".!?")


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often a description fails its facts; all zero for a faultless one."""

    missing: int
    """Facts that are not said."""
    wrong: int
    """Other values said for a field of the fact list, beside the right one or instead of it."""
    invented: int
    """Values said for fields that the fact list does not have, and other places named."""
    garbled: int
    """Words, or their order, that no fluent description has; a missing end."""
    repeated: int
    """Facts, words and sentences said again."""

    @property
    def total(self) -> float:
        """The number of faults; a repetition counts half."""
        return self.missing + self.wrong + self.invented + self.garbled + 0.5 * self.repeated


@dataclass(frozen=True, kw_only=True)
class Language:
    """What the labeler can read, and takes for fluent."""

    phrases: dict[Words, tuple[str, str]]
    """The words of a phrase to the blank that it fills and the level that it says."""
    order: int
    """Length of `runs`; 1 accepts any order of known words."""
    runs: frozenset[Words]
    """Runs of words and blanks that occur in fluent descriptions."""

    @cached_property
    def sayable(self) -> frozenset[tuple[str, str]]:
        """(field, level) of everything that some phrase says."""
        return frozenset((field_of(blank), level) for blank, level in self.phrases.values())


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A description as the labeler reads it."""

    sentences: list[Words]
    """Each a run of words and `{blank}`s."""
    said: Counter[tuple[str, str]]
    """How often each (field, level) is said."""
    other_places: set[Words]
    """Names that are not in the fact list."""


def count_faults(facts: Mapping[str, str], text: str, language: Language | None = None) -> Faults:
    """The faults of `text` as a description of `facts`, by default in the generator's language."""
    language = language or places_language()
    reading = _read(facts, text, language)
    missing = wrong = invented = repeated = 0
    for field in facts.keys() | {field for field, _ in reading.said}:
        times = {level: n for (said, level), n in reading.said.items() if said == field}
        repeated += sum(times.values()) - len(times)
        if field not in facts:
            invented += len(times)
        elif not times:
            missing += 1
        else:
            wrong += len(times.keys() - {level_of(field, facts[field])})
    # Another place's name stands in for the name or the neighbour that is missing, or is invented.
    unnamed = sum(f in facts and (f, facts[f]) not in reading.said for f in ("name", "near"))
    mistaken = min(unnamed, len(reading.other_places))
    # Each sentence may name the place again.
    renamed = max(0, reading.said["name", facts.get("name", "")] - 1)
    repeated -= min(renamed, max(0, len(reading.sentences) - 1))
    repeated += len(reading.sentences) - len(set(reading.sentences))
    repeated += sum(a == b for sentence in reading.sentences for a, b in pairwise(sentence))
    return Faults(
        missing=missing - mistaken,
        wrong=wrong + mistaken,
        invented=invented + len(reading.other_places) - mistaken,
        garbled=_count_garbled(reading.sentences, language),
        repeated=repeated,
    )


def score(facts: Mapping[str, str], text: str, language: Language | None = None) -> float:
    """Minus the number of faults, a repetition counting half; 0 is best."""
    return -count_faults(facts, text, language).total


def rank(
    facts: Mapping[str, str],
    completions: Sequence[str],
    language: Language | None = None,
    *,
    faults_per_level: float = 0.5,
) -> list[int]:
    """Dense ranks by level of quality: 1 is best, equal levels share a rank.

    A faultless text is of the best level, the next `faults_per_level` faults are one level more,
    and
    so on. The paper's labelers were told to let similar answers tie (InstructGPT, app. B).
    """
    scores = [score(facts, completion, language) for completion in completions]
    levels = [math.ceil(-value / faults_per_level) for value in scores]
    return [sorted(set(levels)).index(level) + 1 for level in levels]


@cache
def places_language() -> Language:
    """The generator's language, exactly: every run of three that its sentences can hold."""
    phrases = _phrase_table(phrasings.PHRASES)
    for words in (*NAME_WORDS, *LANDMARK_WORDS):
        phrases |= {(word.lower(),): (_OTHER_PLACE, "") for word in words}
    runs: set[Words] = set()
    for form in sentence_forms():
        items = [_FIRST if form.is_opening else _LATER]
        for part in form.parts:
            items += [part] if part.startswith("{") else _words(part)
        runs.update(_runs((*items, "."), order=3))
    return Language(phrases=phrases, order=3, runs=frozenset(runs))


def e2e_language(demonstrations: Iterable[tuple[str, str]]) -> Language:
    """The language of E2E's writers, its words and names from (prompt, response) demonstrations.

    People's sentences are too free to judge the order of the words, so only the words count.
    """
    phrases = _phrase_table(e2e_phrases.E2E_PHRASES)
    described = [(parse_facts(prompt), response) for prompt, response in demonstrations]
    for facts, _ in described:
        names = (facts[field] for field in ("name", "near") if field in facts)
        phrases |= {tuple(_words(name)): (_OTHER_PLACE, "") for name in names}
    language = Language(phrases=phrases, order=1, runs=frozenset())
    known = {_FIRST, _LATER, _UNFINISHED}
    for facts, response in described:
        known.update(item for words in _read(facts, response, language).sentences for item in words)
    return Language(phrases=phrases, order=1, runs=frozenset((item,) for item in known))


def _phrase_table(
    phrases: Mapping[str, Mapping[str, Sequence[str]]],
) -> dict[Words, tuple[str, str]]:
    return {
        tuple(_words(phrase)): (blank, level)
        for blank, levels in phrases.items()
        for level, wordings in levels.items()
        for phrase in wordings
    }


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation without accents; "an" is read as "a"."""
    letters = unicodedata.normalize("NFKD", text.lower().replace("\u2019", "'"))
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return ["a" if word == "an" else word for word in _TOKEN.findall(plain)]


def _own_phrases(facts: Mapping[str, str], language: Language) -> dict[Words, tuple[str, str]]:
    """The names of this fact list, and values that the language has no phrase for, verbatim."""
    own: dict[Words, tuple[str, str]] = {}
    for field, value in facts.items():
        if (field, level_of(field, value)) not in language.sayable:
            words = tuple(_words(value))
            own[words] = (field, level_of(field, value))
            if words[0] == "the":
                own[words[1:]] = own[words]
    return own


def _read(facts: Mapping[str, str], text: str, language: Language) -> _Reading:
    """Read from left to right, at each word the longest phrase that starts there."""
    phrases = {**language.phrases, **_own_phrases(facts, language)}
    longest = max(map(len, phrases))
    words = _words(text)
    items: list[str] = []
    said: Counter[tuple[str, str]] = Counter()
    other_places: list[Words] = []
    position = 0
    while position < len(words):
        for end in range(min(position + longest, len(words)), position, -1):
            phrase = tuple(words[position:end])
            if phrase in phrases:
                blank, level = phrases[phrase]
                break
        else:
            items.append(words[position])
            position += 1
            continue
        if blank != _OTHER_PLACE:
            said[field_of(blank), level] += 1
            items.append("{" + blank + "}")
        elif items[-1:] == [_OTHER_PLACE] and len(other_places[-1]) == 1:
            other_places[-1] += phrase  # the generator's names are two words long
        else:
            other_places.append(phrase)
            items.append(_OTHER_PLACE)
        position = end
    return _Reading(sentences=_sentences(items), said=said, other_places=set(other_places))


def _sentences(items: list[str]) -> list[Words]:
    ends = [i + 1 for i, item in enumerate(items) if item in _FULL_STOPS]
    cuts = sorted({0, *ends, len(items)})
    return [tuple(items[start:end]) for start, end in pairwise(cuts)]


def _runs(items: Words, *, order: int) -> list[Words]:
    """Every run of `order` items; the first item, a sentence's start, is repeated to fill."""
    padded = (items[0],) * (order - 2) + items
    return [padded[i : i + order] for i in range(len(padded) - order + 1)]


def _count_garbled(sentences: list[Words], language: Language) -> int:
    """One fault for each item that breaks runs: a wrong word breaks as many runs as it is in."""
    garbled = 0 if sentences else 1
    for index, sentence in enumerate(sentences):
        items = (_LATER if index else _FIRST, *sentence)
        if sentence[-1] not in _FULL_STOPS:
            items += (_UNFINISHED,)
        broken = [not _is_fluent(run, language) for run in _runs(items, order=language.order)]
        stretches = (len(list(words)) for is_broken, words in groupby(broken) if is_broken)
        garbled += sum(math.ceil(length / language.order) for length in stretches)
    return garbled


def _is_fluent(run: Words, language: Language) -> bool:
    """Whether the run occurs, with any other place's name read as one of the fact list's."""
    readings = [
        tuple(own if item == _OTHER_PLACE else item for item in run) for own in ("{name}", "{near}")
    ]
    return any(reading in language.runs for reading in readings)
