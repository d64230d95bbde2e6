"""Lists that a container has kept otherwise.

As a text of JSON: cells of CSV, and columns of many tables. Or as an object of lists, one of roles
and one of contents, which is how `datasets` keeps a sequence of messages.
"""

import json
from typing import Any

from engine.containers.json_lines import without_nulls
from engine.containers.row import BadRecord
from engine.errors import cut

# No text in any shape: one that begins as a list or an object does is JSON, or a mistake.
_LISTS = {"messages", "conversations", "conversation", "completions", "ranks", "scores"}
# Text in some shapes, so JSON alone where each item says who speaks: a prompt may be "[1, 2]".
_CHATS = {
    *("prompt", "response", "completion", "chosen", "rejected", "context", "context_messages"),
    *("preferred_output", "non_preferred_output", "conversation_a", "conversation_b"),
}
# JSON where it is JSON: a text of one's own is none.
_OTHERS = {"turns", "instances", "summaries", "answers", "info", "mc1_targets", "history"}
_SPEAKERS = (("role", "content"), ("from", "value"))


def with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the lists in the fields that hold some; BadRecord, which names the field,
    for a text that is to be a list and is no JSON."""
    found = {name: held for name, value in row.items() if (held := _held(name, value)) is not value}
    return row | found if found else row


def _held(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _as_messages(value) if name in _LISTS or name in _CHATS else value
    if not isinstance(value, str) or name not in _LISTS | _CHATS | _OTHERS:
        return value
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed = without_nulls(json.loads(value))
    except (ValueError, RecursionError) as error:
        if name not in _LISTS:
            return value
        how = " (Python's way to write a list? write it by json.dumps)" if "'" in value else ""
        raise BadRecord(
            f"is a text that begins as a list does, and no JSON: {cut(str(error))}{how}", field=name
        ) from None
    if isinstance(parsed, dict):
        parsed = _as_messages(parsed)
    return parsed if name not in _CHATS or _is_chat(parsed) else value


def _is_chat(value: Any) -> bool:
    """Return whether a value is messages, all of which say who speaks."""
    return bool(value) and isinstance(value, list) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(who), str) and what in value for who, what in _SPEAKERS
    )


def _as_messages(value: dict[str, Any]) -> Any:
    """Return the messages of {"role": [...], "content": [...]}; any other object as it is."""
    for who, what in _SPEAKERS:
        columns = {key: each for key, each in value.items() if isinstance(each, list)}
        if columns.keys() == value.keys() and {who, what} <= columns.keys():
            if len({len(each) for each in columns.values()}) > 1:
                return value
            rows = zip(*columns.values(), strict=True)
            return without_nulls([dict(zip(columns, row, strict=True)) for row in rows])
    return value
