"""What a row of a log asks, and what labels it has: our own fields, or rows of a public data set.

One way for all of them, the stages' (engine/shapes, engine/data/chat.py): so a log is read as a
stage would read it, and a form that is not taken is refused by its name.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.containers.row import BadRecord, required
from engine.data.chat import Messages, asked_by, check_messages, has, parse_reply
from engine.data.comparisons import parse_comparison
from engine.data.pairs import asked_in, without_prompt
from engine.shapes.canonical import LeftOut, Purpose, Row, opened
from engine.shapes.plain_rows import as_ours, claimed_by_plain
from engine.shapes.shapes import PLAIN, SHAPES, nearly, recognised

_LABELS = ("prompt", "messages", "response", "completions", "ranks", "scores", "chosen", "rejected")
_SETS: Mapping[Purpose, str] = {"demonstrations": "sft", "comparisons": "comparisons"}
_KEPT_IN_MESSAGE = ("role", "content", "weight")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a row says."""

    prompt: str | Messages
    response: str | None = None
    completions: list[str] | None = None
    ranks: list[int] | None = None
    """From 1, which is best; none is left out."""
    is_cut: bool = False
    """Whether the prompt is what two texts have in common (engine/data/pairs.py)."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(data set, why) of labels from which nothing is learned."""


def labels_of(row: Row, *, are_named: bool) -> tuple[Labels, str, set[str]]:
    """Return what a row says, of which shape it is ("" for our own fields) and which of its fields
    were read; BadRecord, which names the field, where it cannot be read.

    are_named: the fields of the row have our names because somebody said so; then it is of no other
    shape.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if row.get("response") is None and "demonstration" in row:
        row["response"] = row.pop("demonstration")
    shape = PLAIN if are_named else _shape_of(row)
    left_out: list[tuple[str, str]] = []
    found, claimed = row, set(_LABELS) | {"demonstration"}
    if shape != PLAIN:
        found, claimed = _of_shape(row, shape, left_out), SHAPES[shape].claimed(row)
    return _parsed(found, left_out), "" if shape == PLAIN else shape, claimed


def _shape_of(row: Row) -> str:
    if not _may_be_of_a_set(frozenset(row)) and claimed_by_plain(row):
        return PLAIN
    names = recognised(row)
    if names == ["prompt-label"]:  # of a log, where both are likely
        raise BadRecord(
            "may be a response or a use case: --fields.response label, or --fields.kind label",
            field="label",
        )
    if len(names) > 1:
        raise BadRecord(f"may be of {' or '.join(names)}; name the fields by --fields.prompt, ...")
    if names:
        return names[0]
    near = [f"{name} ({SHAPES[name].keys})" for name in nearly(row)]
    known = f"; a known shape that is near: {', '.join(near)}" if near else ""
    try:
        required(row, "prompt")
    except BadRecord as error:
        raise BadRecord(f"{error}{known}; name it by --fields.prompt") from None
    return PLAIN  # a prompt of a form that its reader will refuse by its field


@functools.lru_cache(maxsize=1024)
def _may_be_of_a_set(keys: frozenset[str]) -> bool:
    """Return whether a row of these fields needs a look at their values: most logs' does not."""
    return any(shape.keys and keys.issuperset(shape.keys.split(", ")) for shape in SHAPES.values())


def _of_shape(row: Row, name: str, left_out: list[tuple[str, str]]) -> Row:
    """Return a row of a public data set in our fields."""
    shape, found = SHAPES[name], dict[str, Any]()
    if shape.gather is not None:
        raise BadRecord(
            f"is of {shape.title} ({name}), whose rows make records together: give such a file to "
            "the stages as it is"
        )
    for purpose, dataset in _SETS.items():
        is_pair_alone = name == "pair-with-prompt" and "messages" not in row
        if purpose in shape.has and not (purpose == "demonstrations" and is_pair_alone):
            record = _only(shape.read(row, purpose), name)
            if isinstance(record, LeftOut):
                left_out.append((dataset, record.reason))
            else:
                found |= record
    if not found:
        prompt = _only(shape.read(row, "prompts"), name)
        assert not isinstance(prompt, LeftOut)
        found = {**prompt}
    return found


def _only(records: Sequence[Row | LeftOut], name: str) -> Row | LeftOut:
    if len(records) != 1:
        raise BadRecord(
            f"is of {SHAPES[name].title} ({name}) and makes {len(records)} records: give such a "
            "file to the stages as it is"
        )
    return records[0]


def _parsed(row: Row, left_out: list[tuple[str, str]]) -> Labels:
    """Return what a row in our fields says."""
    ours = as_ours(row, "comparisons")
    response, row = _response(ours, left_out)
    asked = asked_in(row)
    if response is not None and has(row, "messages"):
        _check_agree(ours, row)
    completions, ranks = _ranking(row)
    return Labels(
        prompt=[_without_more(each) for each in asked.messages] or asked.text,
        response=None if response is None else without_prompt(asked, [response])[0],
        completions=completions,
        ranks=ranks,
        is_cut=asked.is_cut,
        left_out=tuple(left_out),
    )


def _check_agree(whole: Row, row: Row) -> None:
    """Raise BadRecord where the response answers another prompt than what is compared.

    row: the whole one, its messages up to the response.
    """
    compared = [name for name in ("chosen", "completions") if has(whole, name)]
    if not compared or (asked := asked_in(whole)).field == "prompt":  # then nobody reads messages
        return
    before = check_messages(row["messages"], "messages")
    if list(map(_said, before)) != list(map(_said, asked.messages)):
        what = "chosen and rejected share" if compared[0] == "chosen" else "completions answer"
        problem = f"must begin as the dialogue that {what}, up to the last reply that is trained"
        raise BadRecord(problem, field="messages")


def _said(message: dict[str, Any]) -> tuple[str, str]:
    return message["role"], message["content"]


def _without_more(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with what is trained alone: names and accounts may stand beside it."""
    return {key: message[key] for key in _KEPT_IN_MESSAGE if message.get(key) is not None}


def _response(row: Row, left_out: list[tuple[str, str]]) -> tuple[str | None, Row]:
    """Return the demonstration, None without one, and the row with what was said before it.

    Of a dialogue that is the last reply which is trained: behind one of weight 0 nothing is.
    """
    if has(row, "response"):
        where = "messages" if has(row, "messages") and not has(row, "prompt") else "prompt"
        dialogue = row.get(where)
        if isinstance(dialogue, list) and opened(dialogue) is not dialogue:
            raise BadRecord('ends with the assistant, and there is "response" too', field=where)
        return parse_reply(row["response"], "response"), row
    name = _dialogue_of(row)
    if name is None:
        return None, row
    messages = check_messages(row[name], name)
    replies = [n for n, each in enumerate(messages) if each["role"] == "assistant"]
    if not replies or messages[-1]["role"] != "assistant":
        return None, row
    trained = [n for n in replies if messages[n].get("weight") != 0]
    if not trained:
        left_out.append(("sft", "replies of weight 0"))
    last = trained[-1] if trained else replies[-1]
    asked_by(messages[:last], name)
    return messages[last]["content"] if trained else None, {**row, name: messages[:last]}


def _dialogue_of(row: Row) -> str | None:
    """Return which field has a dialogue that may end in its answer."""
    if has(row, "messages"):
        return "messages"
    is_prompt_alone = not (has(row, "chosen") or has(row, "completions"))
    return "prompt" if isinstance(row.get("prompt"), list) and is_prompt_alone else None


def _ranking(row: Row) -> tuple[list[str] | None, list[int] | None]:
    """Return the completions and their ranks, None and None where there are none."""
    if not any(has(row, name) for name in ("chosen", "rejected", "completions")):
        for name in ("ranks", "scores"):
            if has(row, name):
                raise BadRecord('is there without "completions"', field=name)
        return None, None
    try:
        return parse_comparison(row)[1:]
    except BadRecord as error:
        advice = "; name it by --fields.ranks, or by --fields.scores where higher is better"
        is_named = "ranks" in row or not has(row, "completions")
        raise BadRecord(f"{error}{'' if is_named else advice}") from None
