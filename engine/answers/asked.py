"""What a model is asked, in the form that it was taught to read.

A run of ours reads messages as turns, which its stages have trained (engine/data/chat.py); a model
straight from a Hugging Face folder by its tokenizer's chat template.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from engine.data.chat import Messages, check_messages, parse_prompt, render_prompt
from engine.data.chat_template import ChatTemplate, template_of
from engine.data.examples import Example, LengthReport, TooLong, drop_long, encode_prompts
from engine.data.fields import Fields
from engine.data.jsonl import BadRecord, ReadReport, read_records
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.huggingface.foreign import is_foreign
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank
from engine.run import require_path
from engine.settings.generate import GenerateConfig

Asked = tuple[str, np.ndarray | None]
"""A prompt's text, and its tokens where a template has made them."""


def chosen_template(config: GenerateConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that messages are read by; None for turns. All ranks call together.

    Raises UserError for a template that is asked for and not there, or that does not load; what is
    not asked for is a warning.
    """
    if config.chat != "auto":
        return ChatTemplate(tokenizer) if config.chat == "template" else None
    source = require_path(config.source, "source")
    is_huggingface = said_by_first_rank(lambda: "foreign" if is_foreign(source) else "")
    if not is_huggingface or template_of(tokenizer) is None:
        return None
    try:
        return ChatTemplate(tokenizer)
    except UserError as error:
        if dist.get_rank() == 0:
            say(f"WARNING: {error}; messages are read as turns", stream=sys.stderr)
        return None


def tokens_of_dialogue(
    messages: Messages, tokenizer: Tokenizer, template: ChatTemplate | None, suffix: str
) -> np.ndarray:
    """Return the tokens [n] int64 of messages, with the assistant's turn open; suffix: closes turns
    as it closes every prompt, and nothing of a template's."""
    if template is not None:
        return template.prompt(messages)[1]
    return next(encode_prompts([render_prompt(messages, "messages")], tokenizer, suffix))


def read_asked(
    path: Path, config: GenerateConfig, template: ChatTemplate | None
) -> tuple[list[Asked], ReadReport]:
    """Read what a file asks, as engine.data.prompts.read_prompts does; raises UserError."""

    def parse(record: dict[str, Any]) -> Asked:
        text, in_chat = parse_prompt(record)
        if template is None or not in_chat:
            return text, None
        field = "messages" if isinstance(record.get("messages"), list) else "prompt"
        try:
            return template.prompt(check_messages(record[field], field))
        except UserError as error:
            raise BadRecord(f"is not answered: {error}", field=field) from None

    return read_records(
        path,
        parse,
        skip_bad_lines=config.skip_bad_lines,
        skip_option="--skip-bad-lines",
        shaping=lambda: Fields(
            "prompts", config.fields, too_long=config.too_long, option="--fields"
        ),
    )


def asked_examples(
    asked: list[Asked],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    suffix: str,
    too_long: TooLong = "drop",
) -> tuple[list[Example], LengthReport]:
    """Return the prompts' tokens, as engine.data.prompts.prompt_examples does; suffix: closes those
    that no template has closed."""
    plain = encode_prompts((text for text, made in asked if made is None), tokenizer, suffix)
    tokens = [next(plain) if made is None else made for _, made in asked]
    examples = [Example(tokens=each, prompt_length=len(each)) for each in tokens]
    num_first = len(tokenizer.bos_ids)
    return drop_long(examples, max_length=max_length, too_long=too_long, num_first=num_first)
