"""Prompts: what PPO's rollouts answer, and the split that keeps a prompt on one side."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from engine.data.examples import (
    CUT_OPTION,
    Example,
    LengthReport,
    TooLong,
    drop_long,
    encode_prompts,
)
from engine.data.pairs import asked_in
from engine.data.prompt_format import Prompt
from engine.data.records import SKIP_OPTION, ReadReport, read_records
from engine.data.renderer import Renderer
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError
from engine.shapes.fields import Fields, fields_option


class HasPrompt(Protocol):
    """A record of a file of training data: it answers a prompt."""

    @property
    def prompt(self) -> Prompt:
        """The prompt."""


AnyRecord = TypeVar("AnyRecord", bound=HasPrompt)


def read_prompts(
    path: Path | str,
    renderer: Renderer | None = None,
    *,
    fields: str = "auto",
    skip_bad_lines: bool = False,
    skip_option: str = SKIP_OPTION,
) -> tuple[list[Prompt], ReadReport]:
    """Read what records ask from files of data: {"prompt"} or {"messages"}, those of the
    other purposes, or rows of a known shape; raises UserError, which names the options.

    renderer: what makes prompts of them; without one, as by default. fields: as
    engine.shapes.fields.
    """
    by = renderer or Renderer()
    return read_records(
        path,
        lambda record: by.prompt(asked_in(record)),
        skip_bad_lines=skip_bad_lines,
        skip_option=skip_option,
        shaping=lambda: Fields("prompts", fields, option=fields_option(skip_option)),
    )


def prompt_examples(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    too_long: TooLong = "drop",
    cut_option: str = CUT_OPTION,
) -> tuple[list[Example], LengthReport]:
    """Return the prompts' tokens; those over `max_prompt_length` are dropped and counted, or cut
    on their left (drop_long), as the option says.

    The report's `kept` says which prompt each example came from.
    """
    encoded = encode_prompts(prompts, tokenizer, too_long, cut_option)
    examples = [Example(tokens=tokens, prompt_length=len(tokens)) for tokens in encoded]
    return drop_long(
        examples,
        max_length=max_prompt_length,
        too_long=too_long,
        num_first=len(tokenizer.bos_ids),
    )


def hold_out(
    records: Sequence[AnyRecord], valid_fraction: float, seed: int
) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """Return the records for training and those held out, each prompt on one side; see
    split_by_prompt. Where that would leave none for training, none is held out; UserError where
    the fraction is all of them."""
    kept, out = split_by_prompt([record.prompt.key for record in records], valid_fraction, seed)
    if not kept:
        _check_fraction(valid_fraction)
        kept, out = out, kept
    return [records[index] for index in kept], [records[index] for index in out]


def hold_out_prompts(
    prompts: Sequence[Prompt], valid_fraction: float, seed: int, *, most: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts for training and the distinct ones held out, at most so many, as
    split_by_prompt would; of more, those of the lowest hashes. Where none is left for training as
    hold_out."""
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.key, prompt)
    keys = list(distinct)
    _, out = split_by_prompt(keys, valid_fraction, seed)
    chosen = set(sorted((keys[index] for index in out), key=lambda key: _hash(key, seed))[:most])
    kept = [prompt for prompt in prompts if prompt.key not in chosen]
    if not kept:
        _check_fraction(valid_fraction)
        return list(prompts), []
    return kept, [prompt for key, prompt in distinct.items() if key in chosen]


def _check_fraction(valid_fraction: float) -> None:
    """Raise UserError for a fraction that leaves none whatever the prompts are: of few prompts
    any fraction may take all, by their hashes."""
    if valid_fraction == 1:
        raise UserError(f"--data.valid-fraction {valid_fraction} holds out all prompts")


def split_by_prompt(
    prompts: Sequence[str], valid_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the indices for training and those for validation.

    A hash of the prompt's text decides, so that equal prompts are on one side, and stay there when
    records are added, removed or reordered. About `valid_fraction` of the distinct prompts are for
    validation.
    """
    train: list[int] = []
    valid: list[int] = []
    for index, prompt in enumerate(prompts):
        is_valid = _hash(prompt, seed) < valid_fraction * 2**64
        (valid if is_valid else train).append(index)
    return train, valid


def _hash(prompt: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8])
