"""What a model is asked, in the form that it was taught to read.

That is the form of the run that the source is of; of a Hugging Face folder it is that of the run
which was exported there, or else its tokenizer's chat template.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.cautions.of_prompts import kind_cautions
from engine.data.chat_template import digest_of_template
from engine.data.prompt_format import (
    OPTIONS,
    TEXTS,
    Prompt,
    PromptFormat,
    format_differences,
    in_words,
    prompt_format_beside,
    prompt_format_of,
)
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer
from engine.identity.prompt_formats import default_format
from engine.printable import say
from engine.ranks.first_rank import said_by_first_rank
from engine.run import require_path
from engine.settings.generate import GenerateConfig


def asked_as(config: GenerateConfig, tokenizer: Tokenizer) -> Renderer:
    """Return what reads prompts as the source's were read in training. All ranks call together.

    An option that differs from that is a warning. Raises UserError for a chat template that is
    asked for and not there, or that does not load.
    """
    source = require_path(config.source, "source")
    told = json.loads(said_by_first_rank(lambda: json.dumps(_found(source, config, tokenizer))))
    if dist.get_rank() == 0:
        for warning in told["warnings"]:
            say(f"WARNING: {warning}", stream=sys.stderr)
    return Renderer(prompt_format_of(told["format"]), tokenizer)


def warn_of_kinds(config: GenerateConfig, form: PromptFormat, prompts: Sequence[Prompt]) -> None:
    """Say on the first rank where many prompts are of no kind that the source was trained on."""
    if dist.get_rank() == 0:
        for caution in kind_cautions(form, prompts, f"--source {config.source}", prefix=""):
            say(f"WARNING: {caution.message}", stream=sys.stderr)


def _found(source: Path, config: GenerateConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    kept, warnings = prompt_format_beside(source), []
    if kept is None:
        kept, note = default_format(tokenizer)
        warnings += [note] if note and config.chat is None else []
    form = kept.having({name: getattr(config, name) for name in OPTIONS})
    if form.chat == "template":
        form = replace(form, chat_template=digest_of_template(tokenizer))
    found = format_differences(kept, form)
    if found:
        warnings.append(
            f"{source} was trained to read prompts in another form than it is asked in: "
            f"{in_words(found, 'then', 'now')}"
        )
    if config.system and config.prompts is None and asks_texts(form, config):
        warnings.append(
            "--system goes before dialogues, and this model was trained on plain prompts alone: it "
            "is in none of them; --chat turns asks in dialogues"
        )
    return {"format": asdict(form), "warnings": warnings}


def asks_texts(form: PromptFormat, config: GenerateConfig) -> bool:
    """Return whether a dialogue is asked in plain prompts: the model was trained on nothing else,
    and no other form is asked for. They are dialogues in text where those it was trained on were;
    else each line is one."""
    if form.trained_on != (TEXTS,) or config.chat is not None or config.plain_prompts == "message":
        return False
    return bool(form.text_turns) or form.plain_prompts == "text"
