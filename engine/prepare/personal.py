"""Personal data in texts: what has the form of an address, a number of a person's, or the like.

A pattern of ours says where one may stand, and a kept library whether it is one. phonenumbers has
the numbering plans of all countries, python-stdnum the check digits of cards, IBANs and social
security numbers, Python's ipaddress which addresses are anybody's. Nothing asks the network.

Names, postal addresses, dates of birth and names of accounts have no such form, and are not found;
nor is what is written out in words ("at example dot com").
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from engine.errors import UserError

_EMAIL = re.compile(
    r"(?<![\w.+%'-])\w(?:[\w.+%'-]{0,62}\w)?@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24})(?![\w@-])"
)
_RESERVED = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|test|example|invalid|localhost)$")
_SCALED_IMAGE = re.compile(r"\d+x\.\w+")  # logo@2x.png
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}(?![A-Za-z0-9])")
_CARD = re.compile(
    r"(?<![\d.,-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?"
    r"|\d{4}([ -])\d{6}\2\d{4,5})(?![\d-]|[.,]\d)"
)
# Beginnings and lengths that issuers have: Visa, Mastercard, American Express, Diners, Discover,
# JCB, UnionPay, Maestro (ISO/IEC 7812).
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|35\d{14}|6(?:011|5|4[4-9]|2|0|3)\d*"
)
_SSN = re.compile(r"(?<![\w-])\d{3}([ -])\d{2}\1\d{4}(?![\w-])")
_BARE_SSN = re.compile(
    r"(?:\bssn|social security)\W{0,3}(?:\w+\W+){0,3}?(\d{9})(?!\w)", re.IGNORECASE
)
_IP4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?=\w*:\w*:)[0-9A-Fa-f:]{4,39}(?![\w:])")
_GLOBAL_IP6 = ipaddress.ip_network("2000::/3")  # all that has been given out; "a::b" is C++
_VERSION = re.compile(r"(?:\bv|\bver\.?|\bversions?|\breleases?|[=<>~^])\s*$", re.IGNORECASE)
_DIGITS = re.compile(r"[+(]{0,2}\d(?:[ \u00a0()./+-]{0,3}\d)+")  # with what stands within numbers
_FEWEST_DIGITS = 7  # of a phone number with its area
_E164_DIGITS = 15  # the most that one has, with its country's code (ITU-T E.164)
_MOST_DIGITS = 60  # in a row without other text; more are a table of numbers, our choice
_CALLED = re.compile(
    r"\b(?:phone|call|tel|telephone|mobile|cell|fax|whatsapp|sms|text|reach)\b\W{0,3}"
    r"(?:[^\W\d]+[^\w.;]+){0,4}$",
    re.IGNORECASE,
)
_CUE_CHARACTERS = 40  # before a number, in which a word says what it is; our choice


class Found(NamedTuple):
    """Personal data in a text: text[start:end]."""

    kind: str
    start: int
    end: int


class PersonalData:
    """Finds the kinds of personal data that are asked for. Raises UserError where a library that
    says which they are is not installed."""

    def __init__(self, kinds: Sequence[str], phone_regions: Sequence[str]) -> None:
        """phone_regions: the countries whose numbers are found as they are written at home."""
        try:
            import phonenumbers
            from stdnum import iban, luhn
            from stdnum.us import ssn
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed, which personal data are found by: "
                "pip install 'trident[prepare]' (here: '.[prepare]'), or give --personal keep"
            ) from None
        self._phones: Any = phonenumbers
        self._is_iban: Callable[[str], bool] = iban.is_valid
        self._has_check_digit: Callable[[str], bool] = luhn.is_valid
        self._is_ssn: Callable[[str], bool] = ssn.is_valid
        self._regions = phone_regions
        unknown = set(phone_regions) - set(phonenumbers.SUPPORTED_REGIONS)
        if unknown:
            raise UserError(f"--phone-regions: no country is {min(unknown)}; see ISO 3166")
        # What is found first keeps its text: an IBAN's digits are no card's, a card's no phone's.
        finders: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
            "email": _emails,
            "iban": self._ibans,
            "card": self._cards,
            "ssn": self._ssns,
            "ip": _ips,
            "phone": self._phone_numbers,
        }
        self._finders = {kind: find for kind, find in finders.items() if kind in kinds}

    def find(self, text: str) -> list[Found]:
        """Return what was found, in the order of the text; no two overlap."""
        found: list[Found] = []
        for kind, find in self._finders.items():
            for start, end in find(text):
                if all(end <= other.start or other.end <= start for other in found):
                    found.append(Found(kind, start, end))
        return sorted(found, key=lambda each: each.start)

    def masked(self, text: str) -> str:
        """Return the text with each of them replaced by its kind, such as [EMAIL]."""
        pieces, begin = [], 0
        for kind, start, end in self.find(text):
            pieces += [text[begin:start], f"[{kind.upper()}]"]
            begin = end
        return "".join([*pieces, text[begin:]])

    def _ibans(self, text: str) -> Iterator[tuple[int, int]]:
        for match in _IBAN.finditer(text):
            # The pattern runs on into words behind it: the longest beginning that is one.
            for end in range(match.end(), match.start() + 14, -1):
                written = text[match.start() : end]
                if text[end - 1] not in " -" and _is_97(written) and self._is_iban(written):
                    yield match.start(), end
                    break

    def _cards(self, text: str) -> Iterator[tuple[int, int]]:
        for match in _CARD.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if _ISSUED.fullmatch(digits) and self._has_check_digit(digits):
                yield match.start(), match.end()

    def _ssns(self, text: str) -> Iterator[tuple[int, int]]:
        for match in (*_SSN.finditer(text), *_BARE_SSN.finditer(text)):
            group = 1 if match.re is _BARE_SSN else 0
            if self._is_ssn(re.sub(r"\D", "", match[group])):
                yield match.start(group), match.end(group)

    def _phone_numbers(self, text: str) -> Iterator[tuple[int, int]]:
        for digits in _DIGITS.finditer(text):
            num_digits = sum(map(str.isdigit, digits[0]))
            if not _FEWEST_DIGITS <= num_digits <= _MOST_DIGITS:
                continue
            begin = max(
                0, digits.start() - 1
            )  # a letter or a currency before it says that it is none
            part = text[begin : digits.end() + 1]
            for start, end in self._numbers_in(
                part, text[max(0, begin - _CUE_CHARACTERS) : begin + 1]
            ):
                yield begin + start, begin + end

    def _numbers_in(self, part: str, before: str) -> Iterator[tuple[int, int]]:
        """Yield the phone numbers of a few digits, behind the text `before`."""
        leniency, matcher = self._phones.Leniency, self._phones.PhoneNumberMatcher
        if "+" in part:  # and a country's code
            for match in matcher(part, "ZZ", leniency=leniency.VALID):
                if self._is_a_persons(match):
                    yield match.start, match.end
        for region in self._regions:
            for match in matcher(part, region, leniency=leniency.STRICT_GROUPING):
                # Bare digits are a phone number where a word says so; else an order, a count.
                is_grouped = not match.raw_string.isdigit()
                if (is_grouped or _CALLED.search(before)) and self._is_a_persons(match):
                    yield match.start, match.end

    def _is_a_persons(self, match: Any) -> bool:
        """Return whether a number is short enough, and none that companies alone have, such as a
        toll-free one."""
        if sum(map(str.isdigit, match.raw_string)) > _E164_DIGITS:
            return False
        kinds = self._phones.PhoneNumberType
        companies = (kinds.TOLL_FREE, kinds.PREMIUM_RATE, kinds.SHARED_COST, kinds.UAN)
        return self._phones.number_type(match.number) not in companies


def _is_97(written: str) -> bool:
    """Return whether an IBAN's check digits hold (ISO 7064): of many candidates, the library is
    asked of these alone."""
    compact = re.sub("[ -]", "", written)
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def num_reserved_emails(text: str) -> int:
    """Return how many addresses a text has at domains that are reserved for examples."""
    found = _EMAIL.finditer(text) if "@" in text else ()
    return sum(_RESERVED.search(match[1].lower()) is not None for match in found)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text) if "@" in text else ():
        domain = match[1].lower()
        # Reserved for examples (RFC 2606), or no domain: nobody reads mail there.
        if not _RESERVED.search(domain) and not _SCALED_IMAGE.fullmatch(domain):
            yield match.start(), match.end()


def _ips(text: str) -> Iterator[tuple[int, int]]:
    """Yield addresses that somebody has: those of private networks and of documents are nobody's,
    and four numbers behind "version" are no address."""
    for match in _IP4.finditer(text):
        before = text[max(0, match.start() - _CUE_CHARACTERS) : match.start()]
        if _is_global(match[0]) and not _VERSION.search(before):
            yield match.start(), match.end()
    for match in _IP6.finditer(text) if text.count(":") > 1 else ():
        if _is_global(match[0].rstrip(":")):
            yield match.start(), match.start() + len(match[0].rstrip(":"))


def _is_global(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in _GLOBAL_IP6)
