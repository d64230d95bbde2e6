"""Pairs with the prompt inside: two chats or two texts that begin alike, and where they part."""

import os.path
import unicodedata
from collections.abc import Sequence
from typing import Any

from engine.containers.row import BadRecord, check_text, json_type, required
from engine.data.chat import (
    Asked,
    Messages,
    asked_by,
    asked_in_messages,
    asked_in_prompt,
    check_messages,
    has,
    reply_in,
)

OPEN_TURN = "\n\nAssistant:"
"""What a dialogue in text, as HH-RLHF has them, ends in where a reply is wanted."""
_MIN_REPEATED = 12  # characters
# Scripts whose words no space parts: Thai and Lao, Myanmar, Khmer; Chinese and Japanese are wide.
_UNSPACED = (range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800))


def asked_in(record: dict[str, Any]) -> Asked:
    """Return what a record asks, in any stage (engine/data/chat.py); BadRecord where it asks
    nothing."""
    if are_dialogues(record):
        return split_chats(record)[0]
    if has(record, "messages") and not (has(record, "prompt") and has(record, "response")):
        return asked_in_messages(record)
    if not has(record, "prompt") and has(record, "chosen") and has(record, "rejected"):
        return split_texts(record)[0]
    return asked_in_prompt({key: value for key, value in record.items() if value is not None})


def are_dialogues(record: dict[str, Any]) -> bool:
    """Return whether a record's pair has the prompt within it, as chats."""
    chosen = record.get("chosen")
    has_prompt = has(record, "prompt") or has(record, "messages")
    return isinstance(chosen, list) and (len(chosen) > 1 or not has_prompt)


def split_chats(record: dict[str, Any]) -> tuple[Asked, list[str]]:
    """Return prompt and replies of two chats that are alike up to their last message."""
    chosen, rejected = (_chat(record, name) for name in ("chosen", "rejected"))
    if _said(chosen[:-1]) != _said(rejected[:-1]):
        raise BadRecord("must equal chosen up to the last message", field="rejected")
    asked = asked_by(chosen[:-1], "chosen")
    # Some sets repeat the prompt beside the dialogues; one that says something else is a mistake.
    if has(record, "prompt") and not _is_in(asked_in_prompt(record), asked):
        raise BadRecord("is not in the dialogue that chosen and rejected share", field="prompt")
    return asked, [reply_in(chosen[-1], "chosen[-1]"), reply_in(rejected[-1], "rejected[-1]")]


def split_texts(record: dict[str, Any]) -> tuple[Asked, list[str]]:
    """Return prompt and replies of two texts with a common beginning."""
    chosen = check_text(required(record, "chosen"), "chosen")
    value = required(record, "rejected")
    if not isinstance(value, str):
        raise BadRecord(f"must be a string, as chosen is, not {json_type(value)}", field="rejected")
    rejected = check_text(value, "rejected")
    if chosen == rejected:
        raise BadRecord("is the same text as chosen", field="rejected")
    if OPEN_TURN in chosen and OPEN_TURN in rejected:
        cut = chosen.rindex(OPEN_TURN) + len(OPEN_TURN)
        if rejected.rindex(OPEN_TURN) + len(OPEN_TURN) != cut or chosen[:cut] != rejected[:cut]:
            raise BadRecord('must equal chosen up to the last "Assistant:"', field="rejected")
    else:
        cut = _last_boundary(chosen, rejected)
    if not chosen[:cut].strip():
        raise BadRecord("is missing, and chosen and rejected begin differently", field="prompt")
    replies = [check_text(chosen[cut:], "chosen"), check_text(rejected[cut:], "rejected")]
    return Asked(chosen[:cut], field="chosen", is_cut=True), replies


def without_prompt(asked: Asked, replies: list[str]) -> list[str]:
    """Return replies behind a prompt; where all begin with it as a text, what they say after it.

    One reply does so by mistake where the prompt is a dialogue in text; several also where it is of
    some length, our choice, for answers may well begin as a word of theirs does.
    """
    is_dialogue = asked.text.rstrip().endswith(OPEN_TURN)
    is_long = len(replies) > 1 and len(asked.text.strip()) >= _MIN_REPEATED
    if asked.is_cut or not asked.text or not (is_dialogue or is_long):
        return replies
    behind = [reply.removeprefix(asked.text) for reply in replies]
    is_repeated = all(b != reply and b.strip() for b, reply in zip(behind, replies, strict=True))
    return behind if is_repeated else replies


def _chat(record: dict[str, Any], name: str) -> Messages:
    value = required(record, name)
    if not isinstance(value, list):
        other = "chosen" if name == "rejected" else "rejected"
        raise BadRecord(
            f"must be a list of messages, as {other} is, not {json_type(value)}", field=name
        )
    return check_messages(value, name)


def _is_in(part: Asked, whole: Asked) -> bool:
    """Return whether what a field asks is said in a dialogue."""
    if not part.messages:
        return any(part.text in message["content"] for message in whole.messages)
    said, asked = _said(whole.messages), _said(part.messages)
    return any(said[n : n + len(asked)] == asked for n in range(len(said)))


def _said(messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _last_boundary(first: str, second: str) -> int:
    """Return where two texts that differ part: behind the last whole word that they share, with
    something left of both."""
    cut = len(os.path.commonprefix([first, second]))
    cut = min(cut, len(first) - 1, len(second) - 1)
    while cut and not _ends_word(first, second, cut):
        cut -= 1
    if first[:cut].endswith(" "):  # a word's space belongs to the word
        cut -= 1
    return cut


def _ends_word(first: str, second: str, cut: int) -> bool:
    """Return whether a word may end before a place that two texts have in common."""
    if first[cut - 1].isspace():
        return True
    is_mark = any(unicodedata.category(text[cut]).startswith("M") for text in (first, second))
    return not is_mark and _is_unspaced(first[cut - 1])


def _is_unspaced(character: str) -> bool:
    """Return whether a character is of a script that puts no spaces between words; Hangul does."""
    if any(ord(character) in block for block in _UNSPACED):
        return True
    is_wide = unicodedata.east_asian_width(character) in ("W", "F")
    return is_wide and not unicodedata.name(character, "").startswith("HANGUL")
