"""Demonstrations: prompts with the response a labeler wrote, for supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.chat import check_messages, parse_prompt, parse_reply, render_prompt, render_reply
from engine.data.examples import Example, LengthReport, drop_long, encode_prompts, join_pair
from engine.data.jsonl import SKIP_OPTION, ReadReport, read_records, required
from engine.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Demonstration:
    """One prompt and the response to imitate; the seam's whitespace belongs to one of the two."""

    prompt: str
    response: str


def read_demonstrations(
    path: Path | str, *, skip_bad_lines: bool = False, skip_option: str = SKIP_OPTION
) -> tuple[list[Demonstration], ReadReport]:
    """Read {"prompt", "response"} or {"messages"} from files of data; raises UserError, which
    names the option that skips bad lines.

    Of `messages` the last one, the assistant's, is the response and all before it the prompt.
    """
    return read_records(path, _parse, skip_bad_lines=skip_bad_lines, skip_option=skip_option)


def demonstration_examples(
    demonstrations: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    prompt_suffix: str = "",
) -> tuple[list[Example], LengthReport]:
    """Return prompt + response + end of text for each; the prompt's tokens are not predicted.

    What is over `max_length` tokens, or has a prompt over `max_prompt_length`, is dropped and
    counted. `prompt_suffix` must be the same for demonstrations, comparisons and prompts.
    """
    prompts = encode_prompts((d.prompt for d in demonstrations), tokenizer, prompt_suffix)
    responses = tokenizer.encode_all(d.response for d in demonstrations)
    examples = [
        Example(tokens=join_pair(prompt, response, tokenizer), prompt_length=len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return drop_long(examples, max_length=max_length, max_prompt_length=max_prompt_length)


def _parse(record: dict[str, Any]) -> Demonstration:
    if "messages" in record and "response" not in record:
        messages = check_messages(record["messages"], "messages")
        response = render_reply(messages[-1], "messages[-1]")
        return Demonstration(render_prompt(messages[:-1], "messages"), response)
    prompt, in_chat = parse_prompt(record)
    response = parse_reply(required(record, "response"), "response", in_chat=in_chat)
    return Demonstration(prompt, response)
