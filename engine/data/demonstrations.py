"""Demonstrations: prompts with the response a labeler wrote, for supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.containers.row import BadRecord, required
from engine.data.chat import Asked, check_messages, has, parse_reply, reply_in
from engine.data.examples import (
    TRAINED,
    Example,
    LengthReport,
    TooLong,
    drop_long,
    encode_prompts,
    encode_replies,
)
from engine.data.pairs import asked_in, without_prompt
from engine.data.prompt_format import Prompt, Reply
from engine.data.records import SKIP_OPTION, ReadReport, read_records
from engine.data.renderer import Parts, Renderer
from engine.data.tokenizer import Tokenizer
from engine.shapes.fields import Fields, fields_option


@dataclass(frozen=True)
class Demonstration:
    """One prompt and the response to imitate; the seam's whitespace belongs to one of the two."""

    prompt: Prompt
    response: Reply
    earlier: Parts | None = None
    """Replies within the prompt's tokens that are trained too; None: of no demonstration of a run
    are any."""
    trains_response: bool = True
    """Whether the response is trained, and not the earlier replies alone."""


def read_demonstrations(
    path: Path | str,
    renderer: Renderer | None = None,
    *,
    replies: str = "last",
    fields: str = "auto",
    skip_bad_lines: bool = False,
    skip_option: str = SKIP_OPTION,
) -> tuple[list[Demonstration], ReadReport]:
    """Read {"prompt", "response"}, {"messages"} or rows of a known shape from files of data;
    fields: as engine.shapes.fields. Raises UserError, which names the option that skips bad lines.

    Of `messages` the last one, the assistant's, is the response and all before it the prompt.
    renderer: what makes prompts of them; without one, as by default. replies: "all" trains the
    assistant's earlier messages too.
    """
    by = renderer or Renderer()
    return read_records(
        path,
        lambda record: _parse(record, by, replies),
        skip_bad_lines=skip_bad_lines,
        skip_option=skip_option,
        shaping=lambda: Fields("demonstrations", fields, option=fields_option(skip_option)),
    )


def demonstration_examples(
    demonstrations: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: TooLong = "drop",
) -> tuple[list[Example], LengthReport]:
    """Return prompt + response + end of text for each; the prompt's tokens are not predicted, but
    for earlier replies that are trained.

    What is over `max_length` tokens, or has a prompt over `max_prompt_length`, is dropped and
    counted, or cut (drop_long). With earlier replies the prompt ends before the first that is
    trained.
    """
    prompts = encode_prompts([d.prompt for d in demonstrations], tokenizer, too_long)
    responses = encode_replies([d.response for d in demonstrations], tokenizer)
    examples = [
        _example(demonstration, prompt, response)
        for demonstration, prompt, response in zip(demonstrations, prompts, responses, strict=True)
    ]
    return drop_long(
        examples,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        too_long=too_long,
        num_first=len(tokenizer.bos_ids),
    )


def _example(demonstration: Demonstration, prompt: np.ndarray, response: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, response])
    if demonstration.earlier is None:
        return Example(tokens=tokens, prompt_length=len(prompt))
    trained = np.zeros(len(tokens), dtype=bool)
    trained[len(prompt) :] = demonstration.trains_response
    for start, end in demonstration.earlier:
        trained[start:end] = True
    return Example(
        tokens=tokens, prompt_length=max(1, int(trained.argmax())), fields={TRAINED: trained}
    )


def _parse(record: dict[str, Any], renderer: Renderer, replies: str) -> Demonstration:
    asked = asked_in(record)
    content, weight = _response(record, asked)
    if replies == "last" or not asked.messages:
        if weight == 0:
            raise BadRecord("has a weight of 0: nothing is trained", field="messages[-1]")
        none = None if replies == "last" else ()
        return Demonstration(renderer.prompt(asked), renderer.reply(asked, content), none)
    prompt, earlier = renderer.earlier_replies(asked)
    if not earlier and weight == 0:
        raise BadRecord("has weights of 0 alone: nothing is trained", field=asked.field)
    return Demonstration(prompt, renderer.reply(asked, content), earlier, weight != 0)


def _response(record: dict[str, Any], asked: Asked) -> tuple[str, Any]:
    """Return what the response says, and the weight of its message, None without one."""
    if has(record, "response") or not has(record, "messages"):
        response = required(record, "response")
        (content,) = without_prompt(asked, [parse_reply(response, "response")])
        return content, None if isinstance(response, str) else response[0].get("weight")
    *before, last = check_messages(record["messages"], "messages")
    content = reply_in(last, "messages[-1]")
    if asked.field != "messages" and before != asked.messages:
        raise BadRecord(
            "must begin as the dialogue that chosen and rejected share", field="messages"
        )
    return content, last.get("weight")
