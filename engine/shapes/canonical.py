"""What a row of data gives for a purpose: the records that all stages read, whatever its shape.

    demonstrations   {"prompt", "response"} or {"messages"}
    comparisons      {"prompt", "completions", "ranks"}, or {"chosen", "rejected"}, perhaps "prompt"
    prompts          {"prompt"} or {"messages"}
    text             {"text"}

A prompt is a text or a list of messages. Rows of a shape (engine/shapes/shapes.py) become an
exchange first, with whatever of these fields they have, from which each purpose takes its own. So
one row has one prompt for all of them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.errors import quoted

Row = dict[str, Any]
Purpose = Literal["demonstrations", "comparisons", "prompts", "text"]
PURPOSES: tuple[Purpose, ...] = ("demonstrations", "comparisons", "prompts", "text")
NEEDS: Mapping[Purpose, str] = {
    "demonstrations": "prompt=...,response=...",
    "comparisons": "prompt=...,chosen=...,rejected=... or prompt=...,completions=...,scores=...",
    "prompts": "prompt=...",
    "text": "text=...",
}
"""What --data.fields must name for a purpose."""


class LeftOut(NamedTuple):
    """Why what a data set has is no record, and no mistake either: it is counted by these words."""

    reason: str


Read = Callable[[Row, Purpose], Sequence[Row | LeftOut]]
"""From a row to the records it gives for a purpose; raises BadRecord."""


def text_in(row: Row, key: str, *, within: str = "") -> str:
    """Return a field that is a text with something in it; BadRecord otherwise."""
    return check_text(required(row, key, within=within), f"{within}{key}")


def answer_in(row: Row, key: str, *, within: str = "") -> str:
    """Return a field that is an answer; it may be empty, as some models' are: ranked() and
    of_exchange() leave out what it belongs to."""
    value = required(row, key, within=within)
    return "" if is_blank(value) else text_in(row, key, within=within)


def is_blank(answer: Any) -> bool:
    """Return whether an answer, a text or a list of one message, says nothing."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    return isinstance(answer, str) and not answer.strip()


def paragraphs(row: Row, *keys: str) -> str:
    """Return the texts of these fields, an empty line between two; some may be empty, and those
    after the first missing."""
    required(row, keys[0])
    parts = []
    for key in keys:
        value = row.get(key, "")
        if value != "" and not (isinstance(value, str) and value.isspace()):
            parts.append(check_text(value, key))
    if not parts:
        raise BadRecord("is empty", field=keys[0])
    return "\n\n".join(parts)


def message(role: str, content: str) -> dict[str, str]:
    """Return one message of a dialogue."""
    return {"role": role, "content": content}


def messages_in(value: Any, field: str) -> Any:
    """Return messages as all stages read them: contents that are parts joined, a developer's as the
    system's. What is no list of messages is left as it is, for who reads it to refuse.

    Raises BadRecord for images, tools and their calls: nothing here reads them.
    """
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message_in(each, f"{field}[{index}]") for index, each in enumerate(value)]


def _message_in(value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        return value
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise BadRecord(
                "is a call of a tool, which is not trained here", field=f"{field}.{key}"
            )
    role, content = value.get("role"), value.get("content")
    if role in ("tool", "function"):
        raise BadRecord(
            f"is {quoted(role)}: answers of tools are not trained here", field=f"{field}.role"
        )
    if isinstance(content, list):
        content = _joined_parts(content, f"{field}.content")
    if role == "developer":
        role = "system"
    if role is value.get("role") and content is value.get("content"):
        return value
    return {**value, "role": role, "content": content}


def _joined_parts(parts: list[Any], field: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        where = f"{field}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            said = quoted(kind) if kind is not None else json_type(part)
            raise BadRecord(f"is {said}: of a content's parts only texts are read", field=where)
        texts.append(text_in(part, "text", within=f"{where}."))
    return "\n".join(texts)


def check_no_tools(row: Row) -> None:
    """Raise BadRecord for a row that describes tools: what its dialogue was told is lost here."""
    for key in ("tools", "functions"):
        if row.get(key):
            raise BadRecord("describes tools, which are not trained here", field=key)


def opened(messages: Any) -> Any:
    """Return a dialogue without the assistant's last turn: the prompt of it."""
    is_dialogue = isinstance(messages, list) and len(messages) > 1
    if is_dialogue and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        return messages[:-1]
    return messages


def one(read: Callable[[Row], Row]) -> Read:
    """Return the reader of a shape whose rows are one exchange each.

    read: from a row to its exchange: `prompt` with `response`, or with `completions` and their
    `scores` or `ranks`; or `messages`. `unfit` says why its response is not one to imitate.
    """
    return lambda row, purpose: [of_exchange(read(row), purpose)]


def of_exchange(found: Row, purpose: Purpose) -> Row | LeftOut:
    """Return what an exchange gives for a purpose that its shape has."""
    if purpose == "comparisons":
        return ranked(
            found["prompt"], found["completions"], found.get("scores"), found.get("ranks")
        )
    if purpose == "prompts":
        asked = found["prompt"] if "prompt" in found else opened(found["messages"])
        return LeftOut(EMPTY) if _has_blank_answer(asked) else {"prompt": asked}
    if _has_blank_answer(found.get("messages")) or is_blank(found.get("response")):
        return LeftOut(EMPTY)
    if "unfit" in found:
        return LeftOut(found["unfit"])
    if "messages" in found:
        return {"messages": found["messages"]}
    if "response" not in found:  # where only some rows of a shape have a dialogue to imitate
        raise BadRecord("is missing: there are pairs, and no dialogue to imitate", field="messages")
    prompt, response = found["prompt"], found["response"]
    if isinstance(prompt, list):
        reply = response if isinstance(response, list) else [message("assistant", response)]
        return {"messages": [*prompt, *reply]}
    return {"prompt": prompt, "response": response}


def _has_blank_answer(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(each, dict) and each.get("role") == "assistant" and is_blank([each])
        for each in messages
    )


def ranked(
    prompt: Any,
    completions: list[Any],
    scores: Sequence[float] | None = None,
    ranks: Sequence[float] | None = None,
) -> Row | LeftOut:
    """Return a comparison by scores (higher is better) or ranks (lower is), where it says
    something."""
    values = ranks if scores is None else [-score for score in scores]
    if any(map(is_blank, completions)):
        return LeftOut("comparisons with an empty answer")
    if len(completions) < 2:
        return LeftOut("prompts with one answer alone")
    if values is None or len(set(values)) == 1:
        return LeftOut("ties")
    if all(each == completions[0] for each in completions):
        return LeftOut("prompts whose answers are one text")
    return {"prompt": prompt, "completions": completions, "ranks": ranks_of(values)}


def ranks_of(values: Sequence[float]) -> list[int]:
    """Return the rank from 1 of each value, the lowest first; equal ones share a rank."""
    order = sorted(set(values))
    return [order.index(value) + 1 for value in values]


def pair(prompt: Any, first: Any, second: Any, preference: float) -> Row:
    """Return the exchange of two answers; preference: above 0 for the second, below for the first,
    0 for a tie."""
    return {"prompt": prompt, "completions": [first, second], "scores": [-preference, preference]}


def number_in(row: Row, key: str, *, within: str = "") -> float:
    """Return a field that is a finite number, also one in quotes; BadRecord otherwise."""
    value, field = required(row, key, within=within), f"{within}{key}"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRecord(f"must be a number, not {quoted(value)}", field=field) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"must be a number, not {json_type(value)}", field=field)
    if not abs(value) <= sys.float_info.max:  # NaN is not either
        raise BadRecord(f"must be finite, not {quoted(value)}", field=field)
    return value


def list_in(row: Row, key: str, *, within: str = "") -> list[Any]:
    """Return a field that is a list with something in it; BadRecord otherwise."""
    value = required(row, key, within=within)
    if not isinstance(value, list) or not value:
        kind = "an empty one" if value == [] else json_type(value)
        raise BadRecord(f"must be a list, not {kind}", field=f"{within}{key}")
    return value


def objects_in(row: Row, key: str, *, within: str = "") -> list[Row]:
    """Return a field that is a list of objects; BadRecord otherwise."""
    found = list_in(row, key, within=within)
    for index, each in enumerate(found):
        if not isinstance(each, dict):
            raise BadRecord(
                f"must be an object, not {json_type(each)}", field=f"{within}{key}[{index}]"
            )
    return found


def choice_in(row: Row, key: str, choices: Mapping[Any, float]) -> float:
    """Return what a field's value stands for, also one in quotes; BadRecord for a value that stands
    for nothing."""
    value = required(row, key)
    if isinstance(value, str) and value not in choices:
        words = {str(choice): choice for choice in choices}
        words |= {f"{choice}.0": choice for choice in choices if isinstance(choice, int)}
        value = words.get(value.strip(), value)
    if isinstance(value, list | dict) or value not in choices:
        names = ", ".join(quoted(choice) for choice in choices)
        raise BadRecord(f"must be one of {names}, not {quoted(value)}", field=key)
    return choices[value]


def is_labelled_false(row: Row) -> bool:
    """Return whether a row's `label` says that its answer is a bad one; one that is neither true
    nor false, such as a class, says nothing."""
    label = row.get("label")
    word = label.strip().lower() if isinstance(label, str) else label
    return not isinstance(word, list | dict) and _TRUTHS.get(word) is False


def is_true(row: Row, key: str) -> bool:
    """Return a field that is true or false, also as tables have it: in quotes, or 1 or 0; BadRecord
    otherwise."""
    value = required(row, key)
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, list | dict) or word not in _TRUTHS:
        raise BadRecord(f"must be true or false, not {quoted(value)}", field=key)
    return _TRUTHS[word]


EMPTY = "empty answers"
UNFIT = "completions labelled false"
_TRUTHS: Mapping[Any, bool] = {
    **{True: True, False: False},  # to which 1 and 0 are equal
    **{"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False},
}
