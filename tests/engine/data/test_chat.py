import pytest

from engine.containers.row import BadRecord
from engine.data.chat import Asked, check_messages, parse_reply
from engine.data.pairs import asked_in

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What colour is the sky?"}
ASSISTANT = {"role": "assistant", "content": "Blue"}


def test_a_developer_is_the_system() -> None:
    assert check_messages([SYSTEM | {"role": "developer"}, USER], "prompt") == [SYSTEM, USER]


def test_plain_text_is_taken_exactly() -> None:
    assert asked_in({"prompt": " a\n"}) == Asked(" a\n")
    assert parse_reply("\tb ", "response") == "\tb "
    assert parse_reply([ASSISTANT], "response") == "Blue"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], 'field "prompt" must be a text or a list of messages, not an empty list'),
        (3, 'field "prompt" must be a text or a list of messages, not a number'),
        (["hi"], r'field "prompt\[0\]" must be a message object, not a string'),
        ([{"content": "hi"}], r'field "prompt\[0\].role" is missing'),
        ([{"role": "user"}], r'field "prompt\[0\].content" is missing'),
        ([{"role": "tool", "content": "hi"}], r'field "prompt\[0\].role" must be one of system'),
        ([{"role": ["user"], "content": "hi"}], r'field "prompt\[0\].role" must be one of'),
        ([{"role": "user", "content": ""}], r'field "prompt\[0\].content" is empty'),
        ([USER | {"weight": 0.5}], r'field "prompt\[0\].weight" must be 0 or 1'),
        ([USER | {"weight": True}], r'field "prompt\[0\].weight" must be 0 or 1'),
        ([USER, ASSISTANT], 'field "prompt" needs a user message right before the reply'),
    ],
)
def test_bad_messages_are_named(messages: object, problem: str) -> None:
    with pytest.raises(BadRecord, match=problem):
        asked_in({"prompt": messages})


def test_a_reply_is_one_message_of_the_assistant() -> None:
    with pytest.raises(BadRecord, match='"response" must hold one message, not 2'):
        parse_reply([USER, ASSISTANT], "response")
    with pytest.raises(BadRecord, match='"response" must be from the assistant, not the user'):
        parse_reply([USER], "response")
