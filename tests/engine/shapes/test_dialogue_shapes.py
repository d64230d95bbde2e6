import pytest

from engine.containers.row import BadRecord
from engine.shapes.dialogue_shapes import guanaco, hh, hh_turns, pair_with_prompt, sharegpt
from tests.engine.shapes.shape_samples import asked


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (
            {"from": "observation", "value": "5"},
            r"\[0\].from\" is 'observation', and must be human",
        ),
        ({"from": "human", "value": ""}, r'"conversations\[0\].value" is empty'),
        ({"from": "human"}, r'"conversations\[0\].value" is missing; there is from'),
        ({"value": "a"}, r'"conversations\[0\].role" is missing; there is value'),
        ("a", r'"conversations\[0\]" must be an object, not a string'),
    ],
)
def test_a_turn_that_is_none_is_named(turn: object, said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        sharegpt({"conversations": [turn]})


def test_a_turn_keeps_its_weight() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    (first, last) = sharegpt({"conversations": turns})["messages"]
    assert "weight" not in first
    assert last == {"role": "assistant", "content": "b", "weight": 0}


def test_tools_are_refused() -> None:
    with pytest.raises(BadRecord, match='"tools" describes tools'):
        sharegpt({"conversations": [{"from": "human", "value": "a"}], "tools": "[{}]"})


def test_turns_of_text_are_messages() -> None:
    text = "### Human: a\nb ### c### Assistant: d\n### Human: e"
    assert guanaco({"text": text}) == {"messages": asked("a\nb ### c", "d", "e")}
    assert hh_turns("\n\nHuman: a\n\nAssistant: ", "prompt") == asked("a")
    with pytest.raises(BadRecord, match='"text" does not begin with the turn of a human'):
        guanaco({"text": "Hello. ### Human: a"})
    with pytest.raises(BadRecord, match='"prompt, Assistant" is empty'):
        hh_turns("\n\nHuman: a\n\nAssistant: \n\nHuman: b", "prompt")


def test_pairs_of_text_differ_in_the_last_turn_alone() -> None:
    good = "\n\nHuman: a\n\nAssistant: b"
    with pytest.raises(BadRecord, match='"rejected" ends without a reply'):
        hh({"chosen": good, "rejected": "\n\nHuman: a"})
    assert hh({"chosen": good, "rejected": "\n\nHuman: a\n\nAssistant:"})["completions"] == [
        "b",
        "",
    ]
    with pytest.raises(BadRecord, match='"rejected" must equal chosen up to the last turn'):
        hh({"chosen": good, "rejected": "\n\nHuman: x\n\nAssistant: b"})


def test_a_prompt_beside_dialogues_is_in_them() -> None:
    row = {"chosen": asked("a", "b"), "rejected": asked("a", "c")}
    assert pair_with_prompt({**row, "prompt": asked("a")})["prompt"] == asked("a")
    with pytest.raises(BadRecord, match='"prompt" is not in the dialogue'):
        pair_with_prompt({**row, "prompt": "x"})
    with pytest.raises(BadRecord, match='"rejected" must be a dialogue, as chosen is'):
        pair_with_prompt({**row, "prompt": "a", "rejected": "c"})
    with pytest.raises(BadRecord, match='"rejected" must equal chosen up to the last message'):
        pair_with_prompt({**row, "prompt": "a", "rejected": asked("x", "c")})


@pytest.mark.parametrize(
    "messages", [asked("x", "b"), [{"role": "system", "content": "S"}, *asked("a", "b")]]
)
def test_a_dialogue_beside_a_pair_asks_the_same(messages: list) -> None:
    row = {"prompt": "a", "chosen": asked("a", "b"), "rejected": asked("a", "c")}
    for same in (asked("a"), asked("a", "d")):
        assert pair_with_prompt({**row, "messages": same})["messages"] == same
    with pytest.raises(BadRecord, match='"messages" must begin as the dialogue that chosen and'):
        pair_with_prompt({**row, "messages": messages})
