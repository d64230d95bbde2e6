import random
import sys
import time

import pytest

from benchmarks.made_log import LOOKALIKES, PERSONAL, UNSEEN
from engine.errors import UserError
from engine.prepare.personal import PersonalData

KINDS = ("email", "iban", "card", "ssn", "ip", "phone")
REGIONS = ("US", "GB", "DE", "FR", "IN")


@pytest.fixture(scope="module")
def data() -> PersonalData:
    return PersonalData(KINDS, REGIONS)


def kinds_in(data: PersonalData, text: str) -> list[str]:
    return [found.kind for found in data.find(text)]


@pytest.mark.parametrize("kind, form", [(k, f) for k, forms in PERSONAL.items() for f in forms])
def test_each_form_is_found_as_what_it_is_within_a_text(data, kind, form):
    draw = random.Random(0)
    for _ in range(20):
        said = PERSONAL[kind][form](draw)
        assert kinds_in(data, f"Draft a note: {said} and so on.") == [kind], said
        assert kinds_in(data, said) == [kind], said


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_personal_data_stays(data, name):
    draw = random.Random(0)
    for _ in range(50):
        said = LOOKALIKES[name](draw)
        assert kinds_in(data, f"Draft a note: {said} and so on.") == [], said


@pytest.mark.parametrize("text", UNSEEN.values())
def test_what_is_documented_as_missed_is_missed(data, text):
    assert kinds_in(data, text) == []


def test_what_was_found_does_not_overlap_and_is_masked_by_its_kind(data):
    text = "IBAN DE89 3704 0044 0532 0130 00, 4111 1111 1111 1111; a_b@post.co.uk, +1 415-867-5309"
    assert kinds_in(data, text) == ["iban", "card", "email", "phone"]
    assert data.masked(text) == "IBAN [IBAN], [CARD]; [EMAIL], [PHONE]"
    assert data.masked("nothing here") == "nothing here"
    assert kinds_in(data, data.masked(text)) == []


def test_only_what_is_asked_for_is_looked_for():
    text = "a_b@post.co.uk or +1 415-867-5309 or (415) 867-5309"
    assert kinds_in(PersonalData(("email",), REGIONS), text) == ["email"]
    assert kinds_in(PersonalData(("phone",), ()), text) == ["phone"]
    assert kinds_in(PersonalData(("phone",), ("US",)), text) == ["phone", "phone"]


def test_a_country_that_is_none_is_an_error():
    with pytest.raises(UserError, match="--phone-regions: no country is XX"):
        PersonalData(KINDS, ("US", "XX"))


def test_a_library_that_is_not_installed_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(UserError, match=r"phonenumbers is not installed.*'trident\[prepare\]'"):
        PersonalData(KINDS, REGIONS)


@pytest.mark.parametrize(
    "piece",
    [
        "@",
        "a@",
        "a.",
        "1 ",
        "12 ",
        "1.",
        "a:",
        ":",
        "AB12 ",
        "AB12A",
        "ssn ",
        "+",
        "(1",
        "1-",
        "+1",
    ],
)
def test_texts_of_one_piece_take_no_time(data, piece):
    start = time.process_time()
    data.find(piece * (20_000 // len(piece)))
    assert time.process_time() - start < 5, "20 kB; the time grows with the square of the length"
