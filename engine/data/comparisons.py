"""Comparisons: K completions of one prompt and their ranks, for the reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.containers.row import BadRecord, json_type, required
from engine.data.chat import Asked, parse_reply
from engine.data.examples import (
    Example,
    LengthReport,
    TooLong,
    drop_long,
    encode_prompts,
    encode_replies,
)
from engine.data.pairs import are_dialogues, asked_in, split_chats, split_texts, without_prompt
from engine.data.prompt_format import Prompt, Reply
from engine.data.records import ReadReport, read_records
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer
from engine.errors import quoted
from engine.shapes.fields import Fields


@dataclass(frozen=True)
class Comparison:
    """K >= 2 completions of one prompt; at least two of them differ in rank."""

    prompt: Prompt
    completions: list[Reply]
    ranks: list[int]
    """[K]: 1 is best, ties share a rank, none is left out (1, 2, 2, 3)."""


def read_comparisons(
    path: Path | str,
    renderer: Renderer | None = None,
    *,
    fields: str = "auto",
    skip_bad_lines: bool = False,
) -> tuple[list[Comparison], ReadReport]:
    """Read rankings and pairs from files of data, also mixed in one file, or rows of a known shape;
    fields: as engine.shapes.fields. Raises UserError.

    A ranking is {"prompt", "completions", "ranks"}. A pair is {"prompt", "chosen", "rejected"}, or
    has the prompt inside. Then chosen and rejected are two chats alike up to the last message, or
    two HH-RLHF dialogues alike up to the last "Assistant:". Else the prompt is what two texts have
    in common at their beginning, to the last whole word. A prompt may be text or messages; a
    completion text or a list of one message. renderer: what makes prompts of them; without one, as
    by default.
    """
    by = renderer or Renderer()
    return read_records(
        path,
        lambda record: _parse(record, by),
        skip_bad_lines=skip_bad_lines,
        shaping=lambda: Fields("comparisons", fields),
    )


def comparison_examples(
    comparisons: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: TooLong = "drop",
) -> tuple[list[list[Example]], LengthReport]:
    """Return for each its K sequences, prompt + completion + end of text, with the field `ranks`.

    The score is read at a sequence's last token, the end of text. A comparison with a sequence over
    `max_length` tokens, or a prompt over `max_prompt_length`, is dropped whole and counted, or cut
    on its left alone (drop_long).
    """
    prompts = encode_prompts([c.prompt for c in comparisons], tokenizer, too_long)
    completions = encode_replies([reply for c in comparisons for reply in c.completions], tokenizer)
    units = []
    for comparison, prompt in zip(comparisons, prompts, strict=True):
        unit = [
            Example(
                tokens=np.concatenate([prompt, next(completions)]),
                prompt_length=len(prompt),
                fields={"ranks": rank},
            )
            for rank in comparison.ranks
        ]
        units.append(unit)
    return drop_long(
        units,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        too_long=too_long,
        num_first=len(tokenizer.bos_ids),
    )


def _parse(record: dict[str, Any], renderer: Renderer) -> Comparison:
    asked, contents, ranks = parse_comparison(record)
    completions = [renderer.reply(asked, content) for content in contents]
    return Comparison(renderer.prompt(asked), completions, ranks)


def parse_comparison(record: dict[str, Any]) -> tuple[Asked, list[str], list[int]]:
    """Return what a record in our fields asks, its completions, and their ranks from 1, which is
    best; BadRecord, which names the field, where it compares nothing."""
    is_pair = "chosen" in record or "rejected" in record
    asked, contents, ranks = _parse_pair(record) if is_pair else _parse_ranking(record)
    return asked, without_prompt(asked, contents), ranks


def _parse_ranking(record: dict[str, Any]) -> tuple[Asked, list[str], list[int]]:
    asked = asked_in(record)
    replies = required(record, "completions")
    if not isinstance(replies, list):
        raise BadRecord(f"must be a list, not {json_type(replies)}", field="completions")
    if len(replies) < 2:
        raise BadRecord(f"needs at least 2 to compare, not {len(replies)}", field="completions")
    contents = [parse_reply(reply, f"completions[{n}]") for n, reply in enumerate(replies)]
    if len(set(contents)) == 1:
        raise BadRecord("has the same text each time", field="completions")
    return asked, contents, _parse_ranks(required(record, "ranks"), len(replies))


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


def _parse_pair(record: dict[str, Any]) -> tuple[Asked, list[str], list[int]]:
    chosen, rejected = required(record, "chosen"), required(record, "rejected")
    if are_dialogues(record):
        asked, contents = split_chats(record)
    elif (asked := asked_in(record)).is_cut:
        asked, contents = split_texts(record)
    else:
        contents = [parse_reply(chosen, "chosen"), parse_reply(rejected, "rejected")]
    if contents[0] == contents[1]:
        raise BadRecord("is the same text as chosen", field="rejected")
    return asked, contents, [1, 2]
