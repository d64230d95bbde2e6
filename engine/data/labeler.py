"""The scripted labeler: it counts the faults of a description and ranks descriptions by them.

A description is read phrase by phrase. What the phrases say is compared with the facts (missing,
wrong, invented, repeated); the words between them must stand as they do in fluent descriptions
(garbled). Reciting all values, contradicting oneself, rambling on and stopping short all cost.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from engine.data.phrasings import PHRASES, field_of, level_of, sentence_forms
from engine.data.places import LANDMARK_WORDS, NAME_WORDS

Words = tuple[str, ...]

_PLACE = "{place}"  # the name of some other place
_FIRST, _LATER, _END = "<first>", "<later>", "<end>"
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)?|£\d+|[^\s-]")


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often a description fails its facts; all zero for a faultless one."""

    missing: int
    """Facts that are not said."""
    wrong: int
    """Other values said for a field of the fact list, beside the right one or instead of it."""
    invented: int
    """Values said for fields that the fact list does not have."""
    garbled: int
    """Words that no fluent description holds, or not in this place; a missing end."""
    repeated: int
    """Facts, words or sentences said again."""

    @property
    def total(self) -> float:
        """The number of faults; a repetition counts half."""
        return self.missing + self.wrong + self.invented + self.garbled + 0.5 * self.repeated


@dataclass(frozen=True, kw_only=True)
class Language:
    """What the labeler takes for fluent."""

    phrases: Mapping[Words, tuple[str, str]]
    """Words of a phrase to the slot it fills and the level it says."""
    order: int
    """Length of `runs`."""
    runs: frozenset[Words]
    """Runs of words and slots that occur in fluent descriptions."""


def count_faults(facts: Mapping[str, str], text: str, language: Language | None = None) -> Faults:
    """The faults of `text` as a description of `facts`, in the generator's language by default."""
    language = language or places_language()
    items, said, places = _read(facts, text, language)
    missing = wrong = invented = repeated = 0
    sentences = _sentences(items)
    for field in {field for field, _ in said} | set(facts):
        levels = {level: times for (named, level), times in said.items() if named == field}
        repeated += sum(levels.values()) - len(levels)
        if field not in facts:
            invented += len(levels)
        elif not levels:
            missing += 1
        else:
            wrong += len(levels.keys() - {level_of(field, facts[field])})
    if ("name", facts["name"]) in said:  # a sentence may repeat the name
        again = said["name", facts["name"]] - 1
        repeated -= min(again, len(sentences) - 1)
    # Another place's name stands for a name that should be there, or else is invented.
    replaced = min(
        len(places), sum((f, v) not in said for f, v in facts.items() if f in ("name", "near"))
    )
    missing, wrong, invented = (
        missing - replaced,
        wrong + replaced,
        invented + len(places) - replaced,
    )
    repeated += len(sentences) - len(set(sentences))
    repeated += sum(a == b for s in sentences for a, b in zip(s, s[1:]))
    return Faults(
        missing=missing,
        wrong=wrong,
        invented=invented,
        garbled=_count_garbled(sentences, language),
        repeated=repeated,
    )


def score(facts: Mapping[str, str], text: str, language: Language | None = None) -> float:
    """Minus the number of faults: 0 is best."""
    return -count_faults(facts, text, language).total


def rank(
    facts: Mapping[str, str], completions: Sequence[str], language: Language | None = None
) -> list[int]:
    """Dense ranks by score: 1 is best, equal scores share a rank."""
    scores = [score(facts, completion, language) for completion in completions]
    best_first = sorted(set(scores), reverse=True)
    return [best_first.index(value) + 1 for value in scores]


@cache
def places_language() -> Language:
    """The language of the generator, exactly: every run of three that its sentences can hold."""
    phrases = phrase_table(PHRASES)
    for word in (word for words in (*NAME_WORDS, *LANDMARK_WORDS) for word in words):
        phrases[(word.lower(),)] = (_PLACE, "")
    runs: set[Words] = set()
    for form in sentence_forms():
        words = []
        for part in form.parts:
            words.extend([part] if part.startswith("{") else _words(part))
        start = _FIRST if form.is_opening else _LATER
        runs.update(_runs((start, *words, "."), 3))
    return Language(phrases=phrases, order=3, runs=frozenset(runs))


def phrase_table(phrases):
    return {
        tuple(_words(phrase)): ("{" + slot + "}", level)
        for slot, levels in phrases.items()
        for level, wordings in levels.items()
        for phrase in wordings
    }


def _words(text: str) -> list[str]:
    """Lower-case words and punctuation; hyphens part words, accents go, "an" is "a"."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return ["a" if word == "an" else word for word in _TOKEN.findall(plain)]


def _read(facts, text, language):
    own = {
        tuple(_words(facts[f])): ("{" + f + "}", facts[f]) for f in ("name", "near") if f in facts
    }
    known = language.phrases
    longest = _longest(language)
    words = _words(text)
    items = []
    said = Counter()
    places = []
    i = 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            w = tuple(words[i : i + n])
            hit = own.get(w) or known.get(w)
            if hit:
                break
        if not hit:
            items.append(words[i])
            i += 1
            continue
        slot, level = hit
        if slot == _PLACE:
            if items and items[-1] == _PLACE:
                places[-1] += w
            else:
                places.append(w)
                items.append(_PLACE)
        else:
            said[field_of(slot[1:-1]), level] += 1
            items.append(slot)
        i += n
    return items, said, set(places)


_L = {}


def _longest(language):
    if id(language) not in _L:
        _L[id(language)] = max(map(len, language.phrases))
    return max(_L[id(language)], 6)


def _sentences(items):
    s = [[]]
    for it in items:
        s[-1].append(it)
        if it in (".", "!", "?"):
            s.append([])
    return [tuple(x) for x in s if x]


def _runs(words, order):
    padded = (words[0],) * (order - 2) + tuple(words)
    return [padded[i : i + order] for i in range(len(padded) - order + 1)]


def _count_garbled(sentences, language):
    n = 0
    if not sentences:
        return 1
    for k, s in enumerate(sentences):
        seq = (_FIRST if k == 0 else _LATER, *s)
        if s[-1] not in (".", "!", "?"):
            seq += (_END,)
        ok = [r in language.runs or _PLACE in r for r in _runs(seq, language.order)]
        for good, g in groupby(ok):
            if not good:
                n += math.ceil(len(list(g)) / language.order)
    return n
