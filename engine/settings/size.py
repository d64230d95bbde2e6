"""The size that a setting names. Imports neither torch nor megatron."""

import dataclasses
from pathlib import Path

from engine.errors import UserError, quoted
from models.sizes import SIZES, GPTSize


def named_size(name: str) -> GPTSize:
    """Return the size of that name, with GPT-3's vocabulary unless it is a small one; raises
    UserError for an unknown name."""
    if name not in SIZES:
        raise UserError(f"no size is named {quoted(name)}; the sizes are {', '.join(SIZES)}")
    return SIZES[name]


def size_with(name: str, vocab_size: int, context_length: int | None = None) -> GPTSize:
    """Return the size of that name with a tokenizer's vocabulary; raises UserError for an unknown
    name."""
    size = dataclasses.replace(named_size(name), vocab_size=vocab_size)
    return dataclasses.replace(size, context_length=context_length or size.context_length)


def check_starts(size: str, init_from: Path | None) -> None:
    """Raise UserError where a stage has neither a network to start from nor the size of one that
    starts from nothing."""
    if not size and init_from is None:
        raise UserError(
            "--init-from is required: a run, a checkpoint or a Hugging Face folder. --size names "
            f"a model that starts from nothing: {', '.join(SIZES)}"
        )


def banded(size: GPTSize, band: int) -> GPTSize:
    """Return a size whose every second layer sees `band` tokens, all of whose layers see all where
    it is 0."""
    if not band:
        return size
    form = dataclasses.replace(size.form, window=band, windowed_layers="every second")
    return dataclasses.replace(size, form=form)


def check_named_size(name: str, found: GPTSize, where: Path, role: str) -> None:
    """Raise UserError where a size is named and the network's at a path is another; vocabularies
    and what else sets families apart may differ, as of Cerebras-GPT's sizes."""
    if not name:
        return
    wanted = named_size(name)
    same = {"vocab_size": wanted.vocab_size, "form": wanted.form, "embedding_width": 0}
    if dataclasses.replace(found, **same) != wanted:  # type: ignore[arg-type]
        raise UserError(
            f"{where}: the {role} has {found.num_layers} layers of width {found.hidden_size} and a "
            f"context of {found.context_length} tokens, a {name} has {wanted.num_layers} of "
            f"{wanted.hidden_size} and {wanted.context_length}; with an empty size (--size '', "
            "--reward-model-size '') a model's own is taken"
        )
