"""Prompts and replies as text: plain strings are taken as they are, chat messages are rendered.

A rendered dialogue is its turns, each "Role: content", joined by an empty line. The prompt ends in
the open turn that the reply fills, and the reply begins with the space after the colon:

    System: Answer in one word.

    User: What colour is the sky?

    Assistant:| Blue

where | is the seam between prompt and response. There are no special tokens: a base model reads it
as text.
"""

from typing import Any

from engine.data.jsonl import BadRecord, check_text, json_type, required

OPEN_TURN = "\n\nAssistant:"
_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

Messages = list[dict[str, str]]


def check_messages(value: Any, field: str) -> Messages:
    """Return `value` when it is a list of {"role", "content"}; BadRecord otherwise."""
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else json_type(value)
        raise BadRecord(f"must be a text or a list of messages, not {kind}", field=field)
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise BadRecord(f"must be a message object, not {json_type(message)}", field=where)
        if required(message, "role", within=f"{where}.") not in list(_NAMES):
            raise BadRecord(f"must be one of {', '.join(_NAMES)}", field=f"{where}.role")
        check_text(required(message, "content", within=f"{where}."), f"{where}.content")
    return value


def render_prompt(messages: Messages, field: str) -> str:
    """Return the dialogue with the assistant's turn open; BadRecord unless the user spoke last."""
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord("needs a user message right before the reply", field=field)
    turns = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
    return "\n\n".join(turns) + OPEN_TURN


def render_reply(message: dict[str, str], field: str) -> str:
    """Return the assistant's message as the text that fills the open turn."""
    if message["role"] != "assistant":
        raise BadRecord(f"must be from the assistant, not the {message['role']}", field=field)
    return f" {message['content']}"


def parse_prompt(record: dict[str, Any]) -> tuple[str, bool]:
    """Return a record's `prompt`, or `messages` as one, and whether it ends in an open turn."""
    field = "messages" if "messages" in record and "prompt" not in record else "prompt"
    value = required(record, field)
    if isinstance(value, str):
        return check_text(value, field), False
    return render_prompt(check_messages(value, field), field), True


def parse_reply(value: Any, field: str, *, in_chat: bool) -> str:
    """Return a reply given as text or as a list of one message, to follow parse_prompt's text."""
    if isinstance(value, str):
        content = check_text(value, field)
    else:
        messages = check_messages(value, field)
        if len(messages) != 1:
            raise BadRecord(f"must hold one message, not {len(messages)}", field=field)
        content = render_reply(messages[0], field)[1:]
    return f" {content}" if in_chat else content
