"""Parts of a prompt that a row's shape does not read: none is lost in silence.

A system prompt goes before what the row asks. Any other part is an error, unless the prompt says it
already.
"""

import os.path
from collections.abc import Collection, Iterator
from typing import Any

from engine.containers.row import BadRecord, check_text
from engine.shapes.canonical import Row, message, opened

SYSTEMS = ("system", "system_prompt", "system_message")
PARTS = (
    *SYSTEMS,
    *("instruction", "instructions", "input", "inputs", "context", "context_messages"),
    *("question", "query", "history"),
)
"""Names under which the shapes, and sets near to them, keep what belongs to a prompt."""


def unread_parts(row: Row, read: Collection[str]) -> list[str]:
    """Return the parts of a prompt, in texts or lists, that a row has beside the fields that are
    read of it."""
    return [key for key in PARTS if key not in read and any(text.strip() for text in _in(row, key))]


def check_all_said(row: Row, unread: Collection[str], asked: Any, advice: str) -> None:
    """Raise BadRecord for a part that is not read and that a prompt does not say.

    asked: the prompt, as texts or messages. advice: how fields are named, or "".
    """
    for key in unread:
        if not is_said(row[key], asked):
            raise BadRecord(
                "is a part of a prompt, and would be lost beside the others: "
                f"{advice}drop the column",
                field=key,
                says_remedy=True,
            )


def is_said(part: Any, asked: Any) -> bool:
    """Return whether every text of a part stands in the texts of a prompt, as words of it."""
    said = list(_texts(asked))
    return all(any(_has_words(text, words.strip()) for text in said) for words in _texts(part))


def asked_of(row: Row) -> Any:
    """Return what a row in our own fields asks, as it stands there (engine/data/pairs.py)."""
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row:
        return opened(row["messages"])
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return os.path.commonprefix([chosen, rejected])
    return opened(chosen)


def with_system(record: Row, field: str, content: str) -> Row:
    """Return a record whose prompt begins with a system message, of a field; BadRecord where a
    dialogue has another one, or is a text."""
    system = message("system", check_text(content, field))
    found = dict(record)
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        if prompt.rstrip().endswith("\n\nAssistant:"):
            raise BadRecord("stands beside a dialogue in a text; write it as messages", field=field)
        found["prompt"] = [system, message("user", prompt)]
    elif prompt is not None:
        found["prompt"] = _before(system, prompt, field)
    has_prompt = "prompt" in record
    if "messages" in record:
        found["messages"] = _before(system, record["messages"], field)
        has_prompt = True
    for side in ("chosen", "rejected"):
        value = record.get(side)
        if isinstance(value, list) and (len(value) > 1 or not has_prompt):
            found[side] = _before(system, value, field)
        elif isinstance(value, str) and not has_prompt:
            raise BadRecord("stands beside two texts that hold their prompt", field=field)
    return found


def _before(system: dict[str, str], dialogue: Any, field: str) -> Any:
    first = dialogue[0] if isinstance(dialogue, list) and dialogue else None
    if not isinstance(first, dict):  # no dialogue, as who reads it says
        return dialogue
    if first.get("role") != "system":
        return [system, *dialogue]
    if first.get("content") != system["content"]:
        raise BadRecord("is another system prompt than the dialogue begins with", field=field)
    return dialogue


def _in(row: Row, key: str) -> Iterator[str]:
    value = row.get(key)
    return _texts(value) if isinstance(value, str | list) else iter(())


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a value: of messages what they say, and not who says it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in ("role", "from", "type"):
                yield from _texts(each)


def _has_words(text: str, words: str) -> bool:
    """Return whether words stand in a text, with no letter or digit right before or behind."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not (text[start - 1 : start].isalnum() and words[:1].isalnum()) and not (
            text[end : end + 1].isalnum() and words[-1:].isalnum()
        ):
            return True
        start = text.find(words, start + 1)
    return False
