"""No part of a prompt is lost: what a shape does not read is joined, said already, or an error."""

from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.shapes.fields import Fields
from engine.shapes.prompt_parts import is_said
from tests.engine.shapes.shape_samples import BLUE, GREEN, SKY, SYSTEM, asked, said

PAIR = {"chosen": BLUE, "rejected": GREEN}
REPLY = [said("assistant", BLUE)]


def only(purpose: Any, row: dict[str, Any], fields: str = "auto") -> Any:
    ((_, found),) = Fields(purpose, fields)([("f:1", row)])
    return found


@pytest.mark.parametrize(
    ("purpose", "row", "field"),
    [
        ("comparisons", {"query": SKY, **PAIR}, "query"),
        ("demonstrations", {"context": "At noon.", "question": SKY, "answer": BLUE}, "context"),
        ("demonstrations", {"prompt": SKY, "input": "At noon.", "response": BLUE}, "input"),
        ("demonstrations", {"prompt": SKY, "context": "At noon.", "response": BLUE}, "context"),
        ("demonstrations", {"prompt": SKY, "response": BLUE, "history": [["a", "b"]]}, "history"),
        ("prompts", {"prompt": SKY, "context": "At noon."}, "context"),
        ("demonstrations", {"instruction": "a", "input": "b", "context": "c", "output": "d"}, ""),
        ("comparisons", {"system": "Be brief.", "chosen": "A b.", "rejected": "A c."}, "system"),
        (
            "demonstrations",
            {"system": "Be brief.", "messages": [said("system", "Be."), *asked(SKY, BLUE)]},
            "system",
        ),
        (
            "demonstrations",
            {"system": "Be brief.", "prompt": "\n\nHuman: a\n\nAssistant:", "response": " b"},
            "system",
        ),
        ("prompts", {"system": "B.", "prompt": SKY, "response": BLUE, "helpfulness": 4}, "system"),
    ],
)
def test_a_part_that_nobody_reads_is_an_error(purpose: str, row: dict[str, Any], field: str):
    found = only(purpose, row)
    assert isinstance(found, BadRecord)
    assert str(found).startswith(f'field "{field or "context"}" ')


def test_the_error_says_what_to_do_and_naming_the_fields_does_it():
    row = {"query": SKY, **PAIR}
    said_of_it = str(only("comparisons", row))
    assert "name the fields by --data.fields prompt=...,chosen=" in said_of_it
    assert said_of_it.endswith(", or drop the column")
    assert only("comparisons", row, "prompt=query") == {"prompt": SKY, **PAIR}
    kept = {"prompt": SKY, "response": BLUE}
    assert only("demonstrations", {**kept, "input": "x"}, "prompt=prompt") == kept


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    ("purpose", "row", "record"),
    [
        (
            "demonstrations",
            {"messages": asked(SKY, BLUE)},
            {"messages": [SYSTEM, *asked(SKY, BLUE)]},
        ),
        (
            "demonstrations",
            {"prompt": SKY, "response": BLUE},
            {"prompt": [SYSTEM, *asked(SKY)], "response": BLUE},
        ),
        ("prompts", {"prompt": SKY}, {"prompt": [SYSTEM, *asked(SKY)]}),
        ("comparisons", {"prompt": SKY, **PAIR}, {"prompt": [SYSTEM, *asked(SKY)], **PAIR}),
        (
            "comparisons",
            {"chosen": asked(SKY, BLUE), "rejected": asked(SKY, GREEN)},
            {"chosen": [SYSTEM, *asked(SKY, BLUE)], "rejected": [SYSTEM, *asked(SKY, GREEN)]},
        ),
        (
            "demonstrations",
            {"question": SKY, "answer": BLUE},
            {"prompt": [SYSTEM, *asked(SKY)], "response": BLUE},
        ),
        (
            "demonstrations",
            {"prompt": asked(SKY), "completion": REPLY},
            {"messages": [SYSTEM, *asked(SKY, BLUE)]},
        ),
        (
            "demonstrations",
            {"conversation": asked(SKY, BLUE)},
            {"messages": [SYSTEM, *asked(SKY, BLUE)]},
        ),
    ],
)
def test_a_system_prompt_goes_before_what_is_asked(purpose, row, record, name):
    found = only(purpose, {name: "Be brief.", **row})
    assert {key: found[key] for key in record} == record
    again = {name: "Be brief.", "messages": [SYSTEM, *asked(SKY, BLUE)]}
    assert only("demonstrations", again)["messages"] == again["messages"]
    empty = only(purpose, {name: "", **row})
    assert {key: empty[key] for key in empty if key != name} == only(purpose, row)


def test_what_the_prompt_says_already_is_not_lost():
    row = {"prompt": f"Question: {SKY}\nAnswer:", "response": BLUE, "query": SKY}
    row |= {"input": "", "context": 5, "history": []}
    assert only("demonstrations", row) == row
    assert not is_said("art", "a part")
    assert is_said("part", "a part.")
    assert is_said([["a", "b"]], [said("user", "a"), said("assistant", "b")])
    assert not is_said(SKY, BLUE)
