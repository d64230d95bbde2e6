"""Comparisons: K completions of one prompt and their ranks, for the reward model."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.chat import (
    OPEN_TURN,
    check_messages,
    parse_prompt,
    parse_reply,
    render_prompt,
    render_reply,
)
from engine.data.examples import Example, LengthReport, drop_long, encode_prompts, join_pair
from engine.data.jsonl import BadRecord, ReadReport, check_text, json_type, read_records, required
from engine.data.tokenizer import Tokenizer
from engine.errors import quoted


@dataclass(frozen=True)
class Comparison:
    """K >= 2 completions of one prompt; at least two of them differ in rank."""

    prompt: str
    completions: list[str]
    ranks: list[int]
    """[K]: 1 is best, ties share a rank, none is left out (1, 2, 2, 3)."""


def read_comparisons(
    path: Path | str, *, skip_bad_lines: bool = False
) -> tuple[list[Comparison], ReadReport]:
    """Read rankings and pairs from files of data, also mixed in one file; raises UserError.

    A ranking is {"prompt", "completions", "ranks"}. A pair is {"prompt", "chosen", "rejected"}, or
    has the prompt inside. Then chosen and rejected are two chats alike up to the last message, or
    two HH-RLHF dialogues alike up to the last "Assistant:". Else the prompt is what two texts have
    in common at their beginning, to the last whole word. A prompt may be text or messages; a
    completion text or a list of one message.
    """
    return read_records(path, _parse, skip_bad_lines=skip_bad_lines)


def comparison_examples(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    prompt_suffix: str = "",
) -> tuple[list[list[Example]], LengthReport]:
    """Return for each its K sequences, prompt + completion + end of text, with the field `ranks`.

    The score is read at a sequence's last token, the end of text. A comparison with a sequence over
    `max_length` tokens, or a prompt over `max_prompt_length`, is dropped whole and counted.
    """
    prompts = encode_prompts((c.prompt for c in comparisons), tokenizer, prompt_suffix)
    completions = tokenizer.encode_all(text for c in comparisons for text in c.completions)
    units = []
    for comparison, prompt in zip(comparisons, prompts, strict=True):
        unit = [
            Example(
                tokens=join_pair(prompt, next(completions), tokenizer),
                prompt_length=len(prompt),
                fields={"ranks": rank},
            )
            for rank in comparison.ranks
        ]
        units.append(unit)
    return drop_long(units, max_length=max_length, max_prompt_length=max_prompt_length)


def _parse(record: dict[str, Any]) -> Comparison:
    is_pair = "chosen" in record or "rejected" in record
    return _parse_pair(record) if is_pair else _parse_ranking(record)


def _parse_ranking(record: dict[str, Any]) -> Comparison:
    prompt, in_chat = parse_prompt(record)
    replies = required(record, "completions")
    if not isinstance(replies, list):
        raise BadRecord(f"must be a list, not {json_type(replies)}", field="completions")
    if len(replies) < 2:
        raise BadRecord(f"needs at least 2 to compare, not {len(replies)}", field="completions")
    completions = [
        parse_reply(reply, f"completions[{index}]", in_chat=in_chat)
        for index, reply in enumerate(replies)
    ]
    if len(set(completions)) == 1:
        raise BadRecord("has the same text each time", field="completions")
    return Comparison(prompt, completions, _parse_ranks(required(record, "ranks"), len(replies)))


def _parse_ranks(values: Any, num_completions: int) -> list[int]:
    if not isinstance(values, list):
        raise BadRecord(f"must be a list, not {json_type(values)}", field="ranks")
    if len(values) != num_completions:
        raise BadRecord(f"has {len(values)} ranks for {num_completions} completions", field="ranks")
    for index, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not value >= 0 or value != value // 1:  # NaN is not >= 0
            raise BadRecord(
                f"must be a whole number from 0 up, not {quoted(value)}", field=f"ranks[{index}]"
            )
    if len(set(values)) == 1:
        raise BadRecord(
            f"is {quoted(values[0])} for all {num_completions}: all ties say nothing", field="ranks"
        )
    order = sorted(set(values))
    return [order.index(value) + 1 for value in values]


def _parse_pair(record: dict[str, Any]) -> Comparison:
    chosen, rejected = required(record, "chosen"), required(record, "rejected")
    has_prompt = "prompt" in record or "messages" in record
    has_dialogues = isinstance(chosen, list) and len(chosen) > 1
    if not has_prompt and isinstance(chosen, str):
        chosen, rejected = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        prompt, completions = _split_texts(chosen, rejected)
    elif not has_prompt or has_dialogues:
        prompt, completions = _split_chats(record)
    else:
        prompt, in_chat = parse_prompt(record)
        completions = [
            parse_reply(chosen, "chosen", in_chat=in_chat),
            parse_reply(rejected, "rejected", in_chat=in_chat),
        ]
    if completions[0] == completions[1]:
        raise BadRecord("is the same text as chosen", field="rejected")
    return Comparison(prompt, completions, [1, 2])


def _split_chats(record: dict[str, Any]) -> tuple[str, list[str]]:
    """Return prompt and replies of two chats that are alike up to their last message."""
    chosen = check_messages(record["chosen"], "chosen")
    rejected = check_messages(record["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("must equal chosen up to the last message", field="rejected")
    prompt = render_prompt(chosen[:-1], "chosen")
    # Some sets repeat the prompt beside the dialogues; one that says something else is a mistake.
    if "prompt" in record and parse_prompt(record)[0] not in prompt:
        raise BadRecord("is not in the dialogue that chosen and rejected share", field="prompt")
    replies = [render_reply(chosen[-1], "chosen[-1]"), render_reply(rejected[-1], "rejected[-1]")]
    return prompt, replies


def _split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Return prompt and replies of two texts with a common beginning."""
    if OPEN_TURN in chosen and OPEN_TURN in rejected:
        cut = chosen.rindex(OPEN_TURN) + len(OPEN_TURN)
        if rejected.rindex(OPEN_TURN) + len(OPEN_TURN) != cut or chosen[:cut] != rejected[:cut]:
            raise BadRecord('must equal chosen up to the last "Assistant:"', field="rejected")
    else:
        cut = len(os.path.commonprefix([chosen, rejected]))
        while cut and not chosen[cut - 1].isspace():
            cut -= 1
        if chosen[:cut].endswith(" "):  # a word's space belongs to the word
            cut -= 1
    if not chosen[:cut].strip():
        raise BadRecord("is missing, and chosen and rejected begin differently", field="prompt")
    replies = [check_text(chosen[cut:], "chosen"), check_text(rejected[cut:], "rejected")]
    return chosen[:cut], replies
