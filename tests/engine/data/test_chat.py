import pytest

from engine.data.chat import parse_prompt, parse_reply
from engine.data.jsonl import BadRecord

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What colour is the sky?"}
ASSISTANT = {"role": "assistant", "content": "Blue"}


def test_a_dialogue_is_rendered_with_the_reply_open() -> None:
    prompt, in_chat = parse_prompt({"prompt": [SYSTEM, USER, ASSISTANT, USER]})
    assert in_chat
    assert prompt == (
        "System: Be brief.\n\nUser: What colour is the sky?\n\nAssistant: Blue\n\n"
        "User: What colour is the sky?\n\nAssistant:"
    )
    # The next turn of a dialogue is spelled as prompt + reply, so training sees one form.
    first, _ = parse_prompt({"prompt": [SYSTEM, USER]})
    assert prompt.startswith(first + parse_reply([ASSISTANT], "response", in_chat=True))


def test_messages_are_a_prompt_too() -> None:
    assert parse_prompt({"messages": [USER]}) == parse_prompt({"prompt": [USER]})


def test_plain_text_is_taken_exactly() -> None:
    assert parse_prompt({"prompt": " a\n"}) == (" a\n", False)
    assert parse_reply("\tb ", "response", in_chat=False) == "\tb "
    assert parse_reply([ASSISTANT], "response", in_chat=False) == "Blue"


def test_a_plain_reply_in_a_chat_follows_the_colon() -> None:
    assert parse_reply("Blue", "response", in_chat=True) == " Blue"


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
        ([USER, ASSISTANT], 'field "prompt" needs a user message right before the reply'),
    ],
)
def test_bad_messages_are_named(messages: object, problem: str) -> None:
    with pytest.raises(BadRecord, match=problem):
        parse_prompt({"prompt": messages})


def test_a_reply_is_one_message_of_the_assistant() -> None:
    with pytest.raises(BadRecord, match='"response" must hold one message, not 2'):
        parse_reply([USER, ASSISTANT], "response", in_chat=True)
    with pytest.raises(BadRecord, match='"response" must be from the assistant, not the user'):
        parse_reply([USER], "response", in_chat=True)
