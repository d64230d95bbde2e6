import json
from typing import Any

import pytest

from engine.containers.row import BadRecord
from engine.data.demonstrations import read_demonstrations
from engine.shapes.held_lists import with_lists
from tests.tiny import write_lines

CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
SHAREGPT = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, CHAT) for name in ("messages", "conversation", "prompt", "chosen", "context")),
        *(("conversations", value) for value in (SHAREGPT, ["x", "y"])),
        *(("completions", value) for value in (["x", "y"], [CHAT[1:], CHAT[1:]])),
        *(("ranks", [1, 2]), ("scores", [0.5, 1]), ("turns", ["x"]), ("history", [["x", "y"]])),
        ("info", {"post": "x"}),
    ],
)
def test_a_text_of_json_is_the_list_where_a_field_holds_lists(name: str, value: Any):
    assert with_lists({name: json.dumps(value), "id": 1}) == {name: value, "id": 1}
    assert with_lists({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("prompt", text) for text in ("[1, 2]", "[]", '{"role": "user"}', '[{"a": 1}]', "[")),
        ("prompt", json.dumps([*CHAT, {"role": "user"}])),
        *(("input", json.dumps(CHAT)), ("text", json.dumps(CHAT)), ("response", "{x")),
        *(("history", "[AskReddit] x"), ("messages", "x"), ("chosen", "not [1]")),
    ],
)
def test_any_other_text_is_a_text(name: str, value: str):
    assert with_lists({name: value}) == {name: value}


def test_a_null_in_it_is_a_field_that_is_not_there():
    assert with_lists({"messages": json.dumps([CHAT[0] | {"name": None}])}) == {
        "messages": [CHAT[0]]
    }


@pytest.mark.parametrize("value", [str(CHAT), json.dumps(CHAT)[:-5], "[" * 100_000])
def test_a_list_that_is_no_json_is_a_bad_field(value: str):
    with pytest.raises(
        BadRecord, match='field "messages" is a text that begins as a list does'
    ) as e:
        with_lists({"messages": value})
    assert ("write it by json.dumps" in str(e.value)) == ("'" in value)


def test_roles_and_contents_in_lists_of_their_own_are_messages():
    for chat, name in ((CHAT, "messages"), (SHAREGPT, "conversations"), (CHAT, "chosen")):
        columns = {key: [each[key] for each in chat] for key in chat[0]}
        assert with_lists({name: columns}) == {name: chat}
        assert with_lists({name: json.dumps(columns)}) == {name: chat}
    for other in ({"role": ["user"], "content": []}, CHAT[0], {"role": ["user"], "text": ["x"]}):
        assert with_lists({"messages": other}) == {"messages": other}


def test_fields_that_are_named_hold_lists_too(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"chat": json.dumps(CHAT)}, {"chat": CHAT}])
    (first, second), _ = read_demonstrations(path, fields="messages=chat")
    assert first == second
    _, report = read_demonstrations(
        write_lines(path, [{"messages": str(CHAT)}, {"messages": CHAT}]), skip_bad_lines=True
    )
    assert report.num_bad == 1
