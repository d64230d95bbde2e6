"""What a record asks and what it is answered with, as a file has it: texts, or messages of a chat.

What becomes of it is a matter of the format (engine/data/renderer.py). One record asks the same in
all stages:

    {"chosen": [...], "rejected": [...]}   the messages before the last, which the two share
    {"messages": [...]}                    they, without a last one of the assistant's
    {"prompt": ...}                        a text, or messages
    {"chosen": "...", "rejected": "..."}   what the two texts share

The first that a record has counts, but a `prompt` beside a `response` goes before `messages`. Null
is as if it were not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required

_ROLES = ("system", "user", "assistant")
_SAME_ROLES = {"developer": "system"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """What a record asks."""

    text: str = ""
    """A plain prompt; "" where there are messages."""
    messages: Sequence[dict[str, Any]] = ()
    """The user's is the last."""
    field: str = "prompt"
    """Which has it, for errors."""
    is_cut: bool = False
    """Whether the text is what two have in common: it ends in their middle."""


def has(record: dict[str, Any], key: str) -> bool:
    """Return whether a record has a field that is not null."""
    return record.get(key) is not None


def check_messages(value: Any, field: str) -> Messages:
    """Return `value` when it is a list of {"role", "content"}, a developer's as the system's;
    BadRecord otherwise."""
    if not isinstance(value, list) or not value:
        if isinstance(value, str):
            raise BadRecord("must be a list of messages, and is a text", field=field)
        kind = "an empty list" if value == [] else json_type(value)
        raise BadRecord(f"must be a text or a list of messages, not {kind}", field=field)
    return [_check_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def asked_by(messages: Messages, field: str) -> Asked:
    """Return messages that ask something; BadRecord unless the user spoke last."""
    if not messages or messages[-1]["role"] != "user":
        raise BadRecord("needs a user message right before the reply", field=field)
    return Asked(messages=messages, field=field)


def reply_in(message: dict[str, Any], field: str) -> str:
    """Return what a message of the assistant's says."""
    if message["role"] != "assistant":
        raise BadRecord(f"must be from the assistant, not the {message['role']}", field=field)
    return message["content"]


def parse_reply(value: Any, field: str) -> str:
    """Return a reply given as text or as a list of one message."""
    if isinstance(value, str):
        return check_text(value, field)
    messages = check_messages(value, field)
    if len(messages) != 1:
        raise BadRecord(f"must hold one message, not {len(messages)}", field=field)
    return reply_in(messages[0], field)


def asked_in_messages(record: dict[str, Any]) -> Asked:
    """Return what `messages` ask: a last one of the assistant's is the answer, and no part."""
    messages = check_messages(required(record, "messages"), "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return asked_by(messages, "messages")


def asked_in_prompt(record: dict[str, Any]) -> Asked:
    """Return what `prompt` asks."""
    value = required(record, "prompt")
    if isinstance(value, str):
        return Asked(check_text(value, "prompt"))
    return asked_by(check_messages(value, "prompt"), "prompt")


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRecord(f"must be a message object, not {json_type(message)}", field=where)
    role = required(message, "role", within=f"{where}.")
    role = _SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in list(_ROLES):
        raise BadRecord(f"must be one of {', '.join(_ROLES)}", field=f"{where}.role")
    check_text(required(message, "content", within=f"{where}."), f"{where}.content")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRecord("must be 0 or 1: trained or not", field=f"{where}.weight")
    return {**message, "role": role}
