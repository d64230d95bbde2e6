import pytest

from engine.containers.row import BadRecord
from engine.shapes.canonical import (
    LeftOut,
    choice_in,
    list_in,
    messages_in,
    number_in,
    objects_in,
    of_exchange,
    opened,
    pair,
    paragraphs,
    ranked,
    ranks_of,
)
from engine.shapes.fields import Fields
from tests.engine.shapes.shape_samples import asked, said


def test_an_empty_line_joins_what_belongs_to_one_prompt() -> None:
    assert paragraphs({"a": "x", "b": " ", "c": "y"}, "a", "b", "c", "d") == "x\n\ny"
    with pytest.raises(BadRecord, match='"a" is empty'):
        paragraphs({"a": ""}, "a")
    assert paragraphs({"a": "", "b": "x"}, "a", "b") == "x"
    with pytest.raises(BadRecord, match='"a" is missing'):
        paragraphs({"b": "x"}, "a", "b")
    with pytest.raises(BadRecord, match='"b" must be a string, not a number'):
        paragraphs({"a": "x", "b": 1}, "a", "b")


def test_messages_of_texts_stay_and_others_become_such() -> None:
    plain = asked("a", "b")
    assert messages_in(plain, "m") == plain
    assert messages_in("text", "m") == "text"
    assert messages_in(said("user", "a"), "m") == [said("user", "a")]
    parts = {"role": "developer", "content": [{"type": "text", "text": "a"}]}
    assert messages_in([parts], "m") == [said("system", "a")]
    assert messages_in([5], "m") == [5]  # for who reads them to refuse, with its own words


@pytest.mark.parametrize(
    ("message", "said_of_it"),
    [
        ({"role": "tool", "content": "5"}, r'"m\[0\].role" is \'tool\': answers of tools'),
        ({"role": "assistant", "tool_calls": [{}]}, r'"m\[0\].tool_calls" is a call of a tool'),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"\[0\]\" is 'image_url': of a"),
        ({"role": "user", "content": ["a"]}, r'"m\[0\].content\[0\]" is a string: of a content'),
        ({"role": "user", "content": [{"type": "text"}]}, r'"m\[0\].content\[0\].text" is missing'),
    ],
)
def test_what_nothing_here_reads_is_refused_by_its_field(message: object, said_of_it: str) -> None:
    with pytest.raises(BadRecord, match=said_of_it):
        messages_in([message], "m")


def test_a_prompt_ends_before_the_last_answer() -> None:
    assert opened(asked("a", "b", "c", "d")) == asked("a", "b", "c")
    assert opened(asked("a", "b", "c")) == asked("a", "b", "c")
    assert opened([said("assistant", "a")]) == [said("assistant", "a")]
    assert opened("text") == "text"


def test_an_exchange_has_one_prompt_for_all_purposes() -> None:
    chat = {"prompt": asked("a"), "response": "b"}
    assert of_exchange(chat, "demonstrations") == {"messages": asked("a", "b")}
    assert of_exchange(chat, "prompts") == {"prompt": asked("a")}
    assert of_exchange({**chat, "unfit": "why"}, "demonstrations") == LeftOut("why")
    both = pair("a", "x", "y", 2)
    assert of_exchange(both, "comparisons") == {
        "prompt": "a",
        "completions": ["x", "y"],
        "ranks": [2, 1],
    }
    with pytest.raises(BadRecord, match="no dialogue to imitate"):
        of_exchange(both, "demonstrations")


def test_what_says_nothing_is_left_out_by_its_reason() -> None:
    assert ranked("a", ["x", "y"], [1.0, 1]) == LeftOut("ties")
    assert ranked("a", ["x"], [1.0]) == LeftOut("prompts with one answer alone")
    assert ranked("a", ["x", "x"], [1, 2]) == LeftOut("prompts whose answers are one text")
    assert ranked("a", ["x", "y", "z"], ranks=[0, 4, 0]) == {
        "prompt": "a",
        "completions": ["x", "y", "z"],
        "ranks": [1, 2, 1],
    }


def test_ranks_are_dense_and_equal_values_share_one() -> None:
    assert ranks_of([0.5, -3, 0.5, 10**400]) == [2, 1, 2, 3]


def test_numbers_lists_and_choices_are_checked() -> None:
    assert number_in({"a": "2.5"}, "a") == 2.5
    for value, words in (
        (True, "a boolean"),
        ("N/A", "must be a number, not 'N/A'"),
        (float("nan"), "must be finite, not nan"),
        (10**400, "must be finite"),
        ([], "a list"),
    ):
        with pytest.raises(BadRecord, match=words):
            number_in({"a": value}, "a")
    with pytest.raises(BadRecord, match='"x.a" must be a list, not an empty one'):
        list_in({"a": []}, "a", within="x.")
    with pytest.raises(BadRecord, match=r'"a\[1\]" must be an object, not a string'):
        objects_in({"a": [{}, "b"]}, "a")
    assert (
        choice_in({"a": 1}, "a", {0: -1, 1: 5}) == choice_in({"a": " 1"}, "a", {0: -1, 1: 5}) == 5
    )
    for value in (2, [0], None):
        with pytest.raises(BadRecord, match='"a" must be one of 0, 1, not'):
            choice_in({"a": value}, "a", {0: -1, 1: 5})


_HUMAN = "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("purpose", "row", "fields"),
    [
        ("demonstrations", {"instruction": "a", "input": "", "output": " "}, "auto"),
        ("demonstrations", {"instruction": "a", "response": ""}, "auto"),
        ("demonstrations", {"question": "a", "answer": ""}, "auto"),
        ("demonstrations", {"prompt": "a", "completion": ""}, "auto"),
        ("demonstrations", {"conversations": ["a", ""]}, "auto"),
        (
            "demonstrations",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
            "auto",
        ),
        ("comparisons", {"chosen": f"{_HUMAN} b", "rejected": _HUMAN}, "auto"),
        ("comparisons", {"chosen": f"{_HUMAN} b", "rejected": _HUMAN}, "hh"),
        ("comparisons", {"instruction": "a", "chosen": "b", "rejected": ""}, "auto"),
        (
            "comparisons",
            {
                "prompt": "a",
                "chosen": [said("user", "a"), said("assistant", "b")],
                "rejected": [said("user", "a"), said("assistant", "")],
            },
            "auto",
        ),
    ],
)
def test_an_empty_answer_is_left_out_and_its_prompt_stays(purpose, row, fields) -> None:
    shaping = Fields(purpose, fields)
    assert list(shaping([("f:1", row)])) == []
    assert [why for why in shaping.left_out if "empty answer" in why]
    (found,) = Fields("prompts", fields)([("f:1", row)])
    assert found[1]["prompt"] in ("a", _HUMAN, [said("user", "a")])
