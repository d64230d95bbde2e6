"""Rows of dialogues, as public data sets have them; each function returns the exchange of one."""

import re
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.errors import quoted
from engine.shapes.answer_shapes import instructed
from engine.shapes.canonical import (
    Row,
    answer_in,
    check_no_tools,
    is_blank,
    list_in,
    message,
    messages_in,
    number_in,
    objects_in,
    opened,
    text_in,
)

# Who speaks, in the words of ShareGPT, of its copies and of NeMo.
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_GUANACO = re.compile(r"^### (Human|Assistant):[ \t]*", re.MULTILINE)
_HH = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")


def sharegpt(row: Row) -> Row:
    """Return the exchange of {"conversations": [{"from", "value"}]}, or the same with "role" and
    "content", and perhaps "system" or "tools"."""
    check_no_tools(row)
    return {"messages": _of_sharegpt(row)}


def sharegpt_pair(row: Row) -> Row:
    """Return the exchange of {"conversations", "chosen", "rejected"}, all in ShareGPT's words."""
    check_no_tools(row)
    answers = [_turn(required(row, key), key)["content"] for key in ("chosen", "rejected")]
    return {"prompt": _of_sharegpt(row), "completions": answers, "ranks": [1, 2]}


def _of_sharegpt(row: Row) -> list[dict[str, str]]:
    system = row.get("system")
    found = [message("system", system)] if isinstance(system, str) and system.strip() else []
    for index, turn in enumerate(list_in(row, "conversations")):
        found.append(_turn(turn, f"conversations[{index}]"))
    return found


def _turn(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"must be an object, not {json_type(value)}", field=field)
    key, content = ("from", "value") if "from" in value else ("role", "content")
    role = required(value, key, within=f"{field}.")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRecord(
            f"is {quoted(role)}, and must be human, gpt, system, user or assistant: calls of tools "
            "and their answers are not trained here",
            field=f"{field}.{key}",
        )
    read = answer_in if known == "assistant" else text_in
    found: dict[str, Any] = message(known, read(value, content, within=f"{field}."))
    return found | ({"weight": value["weight"]} if "weight" in value else {})


def lima(row: Row) -> Row:
    """Return the exchange of {"conversations": [TEXT, ...]}, the user's and the assistant's in
    turn."""
    texts = list_in(row, "conversations")
    roles = ("user", "assistant")
    return {
        "messages": [
            message(
                roles[index % 2],
                "" if index % 2 and is_blank(text) else check_text(text, f"conversations[{index}]"),
            )
            for index, text in enumerate(texts)
        ]
    }


def conversation(row: Row) -> Row:
    """Return the exchange of {"conversation": [{"role", "content"}]}: LMSYS-Chat-1M, WildChat."""
    return {"messages": messages_in(list_in(row, "conversation"), "conversation")}


def guanaco(row: Row) -> Row:
    """Return the exchange of {"text": "### Human: ...### Assistant: ..."}."""
    text = re.sub(r"(?<!\n)### (Human|Assistant):", r"\n### \1:", text_in(row, "text"))
    return {"messages": _spoken(text, _GUANACO, "text")}


def hh(row: Row) -> Row:
    r"""Return the exchange of {"chosen", "rejected"}, each "\n\nHuman: ...\n\nAssistant: ...", and
    alike up to the last turn."""
    sides = [_spoken(text_in(row, key), _HH, key) for key in ("chosen", "rejected")]
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if side[-1]["role"] != "assistant":
            if not row[key].rstrip().endswith("\n\nAssistant:"):
                raise BadRecord("ends without a reply", field=key)
            side.append(message("assistant", ""))
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRecord("must equal chosen up to the last turn", field="rejected")
    answers = [side[-1]["content"] for side in sides]
    prompt = sides[0][:-1]
    return {"prompt": prompt, "completions": answers, "ranks": [1, 2]}


def hh_turns(text: str, field: str) -> list[dict[str, str]]:
    r"""Return the messages of a text of turns, each "\n\nHuman: " or "\n\nAssistant: ", where the
    last one may still be open."""
    return _spoken(text, _HH, field)


def _spoken(text: str, mark: re.Pattern[str], field: str) -> list[dict[str, str]]:
    before, *parts = mark.split(text)
    if before.strip() or not parts:
        raise BadRecord("does not begin with the turn of a human", field=field)
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if len(turns) > 1 and not turns[-1][1].strip():  # open
        turns.pop()
    return [
        message(_ROLES[name.lower()], check_text(content.strip(), f"{field}, {name}"))
        for name, content in turns
    ]


def context_messages(row: Row) -> Row:
    """Return the prompt of {"context_messages": [{"role", "content"}]}: OpenRLHF's prompts."""
    found = messages_in(list_in(row, "context_messages"), "context_messages")
    return {"prompt": opened(found)}


def pair_with_prompt(row: Row) -> Row:
    """Return the exchange of {"prompt", "chosen", "rejected"} where both are whole dialogues, whose
    turns before the last are the prompt: UltraFeedback binarized. `messages` is the dialogue to
    imitate, which has to ask the same."""
    chosen, rejected = (messages_in(row[key], key) for key in ("chosen", "rejected"))
    if not isinstance(rejected, list):
        raise BadRecord("must be a dialogue, as chosen is", field="rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("must equal chosen up to the last message", field="rejected")
    asked = messages_in(row["prompt"], "prompt")
    contents = [each.get("content") for each in chosen[:-1] if isinstance(each, dict)]
    # Some sets repeat the prompt beside the dialogues; one that says something else is a mistake.
    if asked != chosen[:-1] and not (isinstance(asked, str) and _says(contents, asked)):
        raise BadRecord("is not in the dialogue that chosen and rejected share", field="prompt")
    found = {
        "prompt": chosen[:-1],
        "completions": [[chosen[-1]], [rejected[-1]]],
        "ranks": [1, 2],
    }
    if row.get("messages") is not None:
        found["messages"] = messages_in(row["messages"], "messages")
        if _said(opened(found["messages"])) != _said(found["prompt"]):
            raise BadRecord(
                "must begin as the dialogue that chosen and rejected share", field="messages"
            )
    return found


def _said(messages: Any) -> Any:
    """Return who says what; what is no dialogue as it is."""
    if not isinstance(messages, list):
        return messages
    return [
        (each.get("role"), each.get("content")) if isinstance(each, dict) else each
        for each in messages
    ]


def _says(contents: list[Any], prompt: str) -> bool:
    texts = [content for content in contents if isinstance(content, str)]
    return any(prompt in text for text in (*texts, "\n\n".join(texts)))


def openai_preference(row: Row) -> Row:
    """Return the exchange of {"input": {"messages", "tools"}, "preferred_output",
    "non_preferred_output"}."""
    asked = required(row, "input")
    check_no_tools(asked)
    answers = [messages_in(row[key], key) for key in ("preferred_output", "non_preferred_output")]
    prompt = messages_in(required(asked, "messages", within="input."), "input.messages")
    return {"prompt": prompt, "completions": answers, "ranks": [1, 2]}


def alpaca_pair(row: Row) -> Row:
    """Return the exchange of {"instruction", "input", "chosen", "rejected"}: LLaMA-Factory's."""
    answers = [answer_in(row, key) for key in ("chosen", "rejected")]
    return {"prompt": instructed(row), "completions": answers, "ranks": [1, 2]}


def nemo(row: Row) -> Row:
    """Return the exchange of {"context", "completions": [{"rank", "completion"}]}; the lowest rank
    is the best."""
    answers = objects_in(row, "completions")
    return {
        "prompt": messages_in(required(row, "context"), "context"),
        "completions": [
            messages_in(
                required(each, "completion", within=f"completions[{index}]."),
                f"completions[{index}].completion",
            )
            for index, each in enumerate(answers)
        ],
        "ranks": [
            number_in(each, "rank", within=f"completions[{index}].")
            for index, each in enumerate(answers)
        ],
    }
