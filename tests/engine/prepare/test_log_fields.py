import json
import math

import pytest

from engine.containers.row import BadRecord
from engine.errors import UserError
from engine.prepare.log_fields import FieldsSeen, name_in, time_in, user_in
from engine.prepare.logs import parse_log
from engine.settings.prepare import LogFields


@pytest.mark.parametrize(
    "written, user",
    [
        *((each, "1") for each in (1, 1.0, "1", "1.0", " 1 ")),
        *((each, None) for each in (None, "", " ", "nan", "NaN", "null", "None", "<NA>")),
        *((each, each) for each in ("01", "1.5", "ann", "a b")),
    ],
)
def test_a_user_is_one_however_a_table_writes_it(written, user):
    assert user_in(written, "user") == user
    assert parse_log({"prompt": "p", "user": written}, LogFields()).user == user


def test_nan_is_no_value():
    row = json.loads('{"prompt": "p", "user": NaN, "time": NaN, "id": NaN, "kind": NaN}')
    record = parse_log(row, LogFields())
    assert (record.user, record.id, record.kind, record.time) == (None, None, None, math.inf)


@pytest.mark.parametrize("value", [1.5, math.inf, True, ["a"], {}])
def test_what_names_nobody_is_refused(value):
    with pytest.raises(BadRecord, match='field "user" must be a text or a whole number'):
        name_in(value, "user")


@pytest.mark.parametrize(
    "written", [60, 60.0, "60", "60.0", "1970-01-01T00:01:00", "1970-01-01 00:01:00Z"]
)
def test_a_time_is_a_number_or_iso_also_as_text(written):
    assert time_in(written, "time") == 60


def test_a_dot_leads_into_an_object():
    names = LogFields(prompt="body.text", user="meta.user")
    row = {"body": {"text": "p"}, "meta": {"user": 3}, "meta.user": None}
    record = parse_log({"body": {"text": "p"}, "meta": {"user": 3}}, names)
    assert (record.prompt, record.user) == ("p", "3")
    assert parse_log(row, names).user is None  # a field of that very name
    with pytest.raises(BadRecord, match=r'field "body.text" is missing; there is body, meta'):
        parse_log({"body": {}, "meta": {}}, names)


def test_an_error_has_the_name_that_the_log_has():
    with pytest.raises(BadRecord, match='field "question" is empty'):
        parse_log({"question": " "}, LogFields(prompt="question"))
    with pytest.raises(BadRecord, match='field "question" is missing; there is prompt'):
        parse_log({"prompt": "p"}, LogFields(prompt="question"))


@pytest.mark.parametrize("name", [name for name in vars(LogFields()) if name != "prompt"])
def test_a_named_field_that_no_line_has_is_an_error(name):
    seen, names = FieldsSeen(), LogFields(**{name: "customer"})
    parse_log({"prompt": "p", "client": 1}, names, seen)
    with pytest.raises(
        UserError, match=f"--fields.{name} customer: none of the 1 lines has it; there is prompt"
    ):
        seen.check(names)


def test_fields_are_counted():
    seen, names = FieldsSeen(), LogFields()
    for row in ({"prompt": "p", "user": 2, "model": "m"}, {"prompt": "q", "user": "nan"}):
        parse_log(row, names, seen)
    parse_log({"instruction": "p", "output": "o", "model": None}, names, seen)
    seen.check(names)
    assert seen.as_object() == {
        "lines": 3,
        "with_field": {"prompt": 2, "user": 1},
        "not_read": {"model": 1},
        "read_as": {"alpaca": 1},
    }
