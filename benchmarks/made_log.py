"""A made log of prompts, and what was planted in it: for benchmarks/prepare.py and the tests.

Everything is drawn from one seed. No person, number or account in it is anybody's: numbers are made
to satisfy a numbering plan or a check digit, as the real ones do.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PREFIX = 200
"""Characters of a long common prefix, the default of engine/settings/prepare.py."""
CAP = 200
"""Prompts of a user that are kept."""


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",")]


_VERBS = _listed("write, draft, summarize, explain, translate, rewrite, list, compare, improve")
_NOUNS = _listed(
    "story, letter, poem, recipe, essay, review, plan, speech, report, answer, article, summary, "
    "song, proposal, description, table, comment, guide, argument, lesson, headline, dialogue"
)
_TOPICS = _listed(
    "the history of glass, a town by the sea, two brothers who build a boat, learning to bake, "
    "the water cycle, a shop that sells old clocks, moving to another country, a long winter, "
    "bees and their hives, the rules of chess, a dog that is afraid of thunder, trains at night, "
    "a garden on a roof, how vaccines work, the price of coffee, a lost umbrella, a school play, "
    "working from home, the moons of Jupiter, repairing a bicycle, the first day of spring"
)
_WORDS = _listed(
    "old, new, quiet, bright, small, large, early, late, river, mountain, bridge, market, window, "
    "kitchen, paper, neighbour, teacher, engine, harbour, island, forest, morning, evening, "
    "question, reason, carefully, slowly, often, together, without, between, because, although, "
    "while, after, before, again"
)


class Planted(NamedTuple):
    """A record of the log, and what should become of it: kept, or dropped for a reason."""

    row: dict
    what: str
    """How it was made."""
    reason: str
    """Why it should be dropped; "" where it should be kept."""


def made_log(number: int, seed: int = 0) -> list[Planted]:
    """Return `number` records: duplicates and near misses, users over the cap, personal data and
    what looks like it, each some hundredths of them; the rest are plain prompts."""
    draw = random.Random(seed)
    writer = _Writer(draw)
    heavy = max(1, number // 25_000)  # users over the cap
    planted = [p for index in range(heavy) for p in writer.heavy_user(f"heavy{index}", CAP + 100)]
    parts = max(1, number // 1000)
    for _ in range(parts):
        planted += writer.duplicates(6) + writer.personal(1) + writer.lookalikes(1)
        planted += writer.unseen(1)
    while len(planted) < number:
        planted.append(writer.plain())
    draw.shuffle(planted)
    _earliest_is_kept(planted)
    return planted


def write_log(path: Path, planted: list[Planted]) -> None:
    """Write the records, one JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(p.row, ensure_ascii=False) + "\n" for p in planted)


def _earliest_is_kept(planted: list[Planted]) -> None:
    """Have the first of each group of duplicates, in the order of the log, be the one to keep."""
    seen: set[str] = set()
    for index, (row, what, _) in enumerate(planted):
        group = row["id"].rpartition("/")[0]
        if what.startswith("duplicate"):
            planted[index] = Planted(row, what, "duplicate" if group in seen else "")
            seen.add(group)


class _Writer:
    """Draws records; each kind of them says what should become of it."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._count = 0

    def plain(self, user: str | None = None, extra: str = "") -> Planted:
        """A prompt like no other: it begins with words that no other has."""
        return Planted(self._row(self._text(extra), user), "plain", "")

    def heavy_user(self, user: str, number: int) -> list[Planted]:
        """Different prompts of one user, more than are kept: which go, only a hash says."""
        rows = [self._row(self._text(), user) for _ in range(number)]
        return [Planted(row, "over the cap", "over_cap") for row in rows]

    def duplicates(self, groups: int) -> list[Planted]:
        """Groups of equal prompts, of prompts with a long common prefix, and near misses."""
        found = []
        for number in range(groups):
            group = f"group{self._count}"
            beginning = self._beginning(PREFIX)
            short = beginning[: PREFIX - 1]
            forms: dict[str, list[str]] = {
                "duplicate: equal": [beginning[:90]] * 3,
                "duplicate: case and whitespace": [
                    beginning,
                    beginning.upper().replace(" ", "\n "),
                ],
                "duplicate: long prefix": [f"{beginning}{self._text()}" for _ in range(4)],
            }
            what = list(forms)[number % 3]
            for index, text in enumerate(forms[what]):
                row = self._row(text, None) | {"id": f"{group}/{index}"}
                found.append(Planted(row, what, "?"))
            other = self._beginning(PREFIX)
            misses = [f"{other[: PREFIX - 1]}{letter} {self._text()}" for letter in "xyz"]
            misses += [f"{letter}{short}" for letter in "ab"]  # alike from the second letter on
            names = ["a character less in common"] * 3 + ["another beginning"] * 2
            found += [
                Planted(self._row(text, None), f"near miss: {name}", "")
                for text, name in zip(misses, names, strict=True)
            ]
        return found

    def personal(self, times: int) -> list[Planted]:
        """Prompts with personal data of each kind, in several forms."""
        return [
            Planted(self._row(self._text(form(self._draw)), None), f"{kind}: {name}", "personal")
            for _ in range(times)
            for kind, forms in PERSONAL.items()
            for name, form in forms.items()
        ]

    def lookalikes(self, times: int) -> list[Planted]:
        """Prompts with what looks like personal data and is none."""
        return [
            Planted(self._row(self._text(form(self._draw)), None), f"look-alike: {name}", "")
            for _ in range(times)
            for name, form in LOOKALIKES.items()
        ]

    def unseen(self, times: int) -> list[Planted]:
        """Prompts with personal data that have no form to be found by."""
        return [
            Planted(self._row(self._text(text), None), f"not found: {name}", "personal")
            for _ in range(times)
            for name, text in UNSEEN.items()
        ]

    def _row(self, text: str, user: str | None) -> dict:
        self._count += 1
        user = user or f"user{self._draw.randrange(20_000)}"
        return {"id": f"{self._count}/0", "prompt": text, "user": user}

    def _beginning(self, characters: int) -> str:
        """A text of so many characters, which no other record shares."""
        self._count += 1
        text = f"Please {self._draw.choice(_VERBS)} number {_in_letters(self._count)}:"
        while len(text) < characters:
            text += f" {self._draw.choice(_WORDS)}"
        return text[: characters - 1] + "."

    def _text(self, extra: str = "") -> str:
        self._count += 1
        draw = self._draw
        words = " ".join(draw.choice(_WORDS) for _ in range(int(draw.expovariate(1 / 60))))
        return (
            f"{draw.choice(_VERBS).capitalize()} {_in_letters(self._count)}, "
            f"a {draw.choice(_NOUNS)} about {draw.choice(_TOPICS)}. {extra} {words}".strip()
        )


def _in_letters(number: int) -> str:
    """A number as a word, so that no prompt has digits by chance."""
    letters = ""
    while number:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _digits(draw: random.Random, number: int, first: str = "") -> str:
    return first + "".join(draw.choice("0123456789") for _ in range(number - len(first)))


def luhn(body: str) -> str:
    """Return the check digit of a card's other digits (ISO/IEC 7812)."""
    doubled = [int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(reversed(body))]
    return str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)


def _card(draw: random.Random, first: str, length: int) -> str:
    body = _digits(draw, length - 1, first)
    return body + luhn(body)


def _grouped(digits: str, *sizes: int, by: str = " ") -> str:
    parts, rest = [], digits
    for size in sizes:
        parts, rest = [*parts, rest[:size]], rest[size:]
    return by.join(parts)


def _iban(draw: random.Random, country: str, body: str) -> str:
    """An IBAN of a country: its check digits are 98 less the rest by 97 (ISO 13616)."""
    number = int("".join(str(int(c, 36)) for c in f"{body}{country}00"))
    return f"{country}{98 - number % 97:02d}{body}"


def _german_iban(draw: random.Random) -> str:
    return _iban(draw, "DE", f"37040044{_digits(draw, 10)}")


def _area(draw: random.Random) -> str:
    return draw.choice(("212", "415", "312", "617", "206", "303", "512", "404"))


def _ssn(draw: random.Random) -> str:
    return f"{draw.randint(100, 600)}-{draw.randint(10, 99)}-{draw.randint(1000, 9999)}"


def _ip4(draw: random.Random) -> str:
    return f"{draw.randint(11, 99)}.{'.'.join(str(draw.randint(1, 254)) for _ in range(3))}"


Form = Callable[[random.Random], str]
PERSONAL: dict[str, dict[str, Form]] = {
    "email": {
        "plain": lambda d: (
            f"Write to {d.choice(_WORDS)}{d.randint(1, 99)}@mail{d.randint(1, 9)}.com"
        ),
        "dots and a plus": lambda d: f"(from j.{d.choice(_WORDS)}+news@post.co.uk)",
        "at a sentence's end": lambda d: (
            f"My address is {d.choice(_WORDS)}_b@uni-{d.choice(_WORDS)}.de."
        ),
    },
    "phone": {
        "US, parentheses": lambda d: f"({_area(d)}) {d.randint(220, 998)}-{d.randint(1000, 9999)}",
        "US, bare behind a word": lambda d: (
            f"Call me at {_area(d)}{d.randint(220, 998)}{d.randint(1000, 9999)}"
        ),
        "Britain, with its code": lambda d: f"+44 20 7946 {d.randint(0, 999):04d}",
        "Germany, at home": lambda d: f"Tel. 030 {d.randint(200000, 999999)}",
        "France, at home": lambda d: f"06 {_grouped(_digits(d, 8, '1'), 2, 2, 2, 2)}",
        "India, with its code": lambda d: f"+91 98765 {d.randint(10000, 99999)}",
        "Brazil, with its code": lambda d: (
            f"+55 11 9{d.randint(6000, 9999)}-{d.randint(1000, 9999)}"
        ),
        "Japan, with its code": lambda d: f"+81 90-{d.randint(1000, 9999)}-{d.randint(1000, 9999)}",
    },
    "card": {
        "Visa": lambda d: f"card {_grouped(_card(d, '4', 16), 4, 4, 4, 4)}",
        "Mastercard, bare": lambda d: f"{_card(d, '53', 16)} is on file",
        "American Express": lambda d: _grouped(_card(d, "37", 15), 4, 6, 5, by="-"),
    },
    "iban": {
        "Germany, spaces": lambda d: _grouped(_german_iban(d), 4, 4, 4, 4, 4, 2),
        "Britain, bare": lambda d: _iban(d, "GB", f"NWBK{_digits(d, 14)}") + " is mine",
    },
    "ip": {
        "4": lambda d: f"requests from {_ip4(d)} fail",
        "6": lambda d: f"host 2a01:4f8:{d.randint(0x1000, 0xFFFF):x}::{d.randint(1, 0xFFFF):x}",
    },
    "ssn": {
        "hyphens": lambda d: f"his number is {_ssn(d)}",
        "bare behind a word": lambda d: f"SSN: {_ssn(d).replace('-', '')}",
    },
}
"""By kind and form: what makes one."""


def _wrong_card(draw: random.Random) -> str:
    body = _digits(draw, 15, "4")
    return _grouped(body + str((int(luhn(body)) + 1) % 10), 4, 4, 4, 4)


def _wrong_iban(draw: random.Random) -> str:
    right = _german_iban(draw)
    return f"{right[:-1]}{(int(right[-1]) + 1) % 10}"


LOOKALIKES: dict[str, Form] = {
    "reserved domain": lambda d: f"such as {d.choice(_WORDS)}@example.com",
    "handle": lambda d: f"by @{d.choice(_WORDS)}{d.randint(1, 99)}",
    "scaled image": lambda d: f"logo{d.randint(1, 9)}@2x.png",
    "card of a wrong check digit": _wrong_card,
    "IBAN of a wrong check digit": _wrong_iban,
    "SSN that is never given": lambda d: f"000-{d.randint(10, 99)}-{d.randint(1000, 9999)}",
    "private address": lambda d: f"192.168.{d.randint(0, 255)}.{d.randint(1, 254)}",
    "version": lambda d: f"version {_ip4(d)}",
    "time": lambda d: f"at {d.randint(10, 23)}:{d.randint(10, 59)}:{d.randint(10, 59)}",
    "date": lambda d: f"on 20{d.randint(10, 24)}-{d.randint(10, 12)}-{d.randint(10, 28)}",
    "years": lambda d: f"from {d.randint(1800, 1899)}-{d.randint(1900, 1999)}",
    "order number": lambda d: f"order {_digits(d, 10, '4')}",
    "large number": lambda d: (
        f"{d.randint(10, 99)},{d.randint(100, 999)},{d.randint(100, 999)} people"
    ),
    "decimals": lambda d: f"3.{_digits(d, 14)}",
    "toll-free number": lambda d: f"1-800-{d.randint(220, 998)}-{d.randint(1000, 9999)}",
    "code": lambda d: f"std::map a::b[{d.randint(1, 9)}]",
}
"""What makes a text that looks like personal data and is none, by what it is."""


UNSEEN = {
    "a name": "for my friend Margaret Oyelaran-Whitcombe",
    "a street address": "to 14 Larkspur Lane, Old Harbour",
    "a date of birth": "born on 3 May 1962",
    "an email in words": "margaret dot o at post dot com",
    "a number at home, of a country that was not named": "llame al 612 34 56 78",
    "a bare number without a word before it": "2125550173 is mine",
}
"""Personal data that are not found, by what they are: see SECURITY.md."""


def by_kind(planted: list[Planted]) -> Iterator[tuple[str, list[Planted]]]:
    """Yield (what, its records) of a log."""
    kinds = defaultdict(list)
    for each in planted:
        kinds[each.what].append(each)
    yield from sorted(kinds.items())
