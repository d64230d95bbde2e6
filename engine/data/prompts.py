"""Prompts: what PPO's rollouts answer, and the split that keeps a prompt on one side."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from engine.data.chat import parse_prompt
from engine.data.examples import Example, LengthReport, drop_long, encode_prompts
from engine.data.jsonl import SKIP_OPTION, ReadReport, read_records
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError


class HasPrompt(Protocol):
    """A record of a file of training data: it answers a prompt."""

    @property
    def prompt(self) -> str:
        """The prompt's text."""


AnyRecord = TypeVar("AnyRecord", bound=HasPrompt)


def read_prompts(
    path: Path | str, *, skip_bad_lines: bool = False, skip_option: str = SKIP_OPTION
) -> tuple[list[str], ReadReport]:
    """Read {"prompt"} or {"messages"} from files of data; raises UserError, which names the
    option that skips bad lines."""
    return read_records(
        path,
        lambda record: parse_prompt(record)[0],
        skip_bad_lines=skip_bad_lines,
        skip_option=skip_option,
    )


def prompt_examples(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    prompt_suffix: str = "",
) -> tuple[list[Example], LengthReport]:
    """Return the prompts' tokens; those over `max_prompt_length` are dropped and counted.

    The report's `kept` says which text each example came from.
    """
    encoded = encode_prompts(prompts, tokenizer, prompt_suffix)
    examples = [Example(tokens=tokens, prompt_length=len(tokens)) for tokens in encoded]
    return drop_long(examples, max_length=max_prompt_length)


def hold_out(
    records: Sequence[AnyRecord], valid_fraction: float, seed: int
) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """Return the records for training and those held out, each prompt on one side; see
    split_by_prompt. Raises UserError where none is left for training."""
    kept, out = split_by_prompt([record.prompt for record in records], valid_fraction, seed)
    if not kept:
        raise UserError(f"--data.valid-fraction {valid_fraction} holds out all prompts")
    return [records[index] for index in kept], [records[index] for index in out]


def hold_out_prompts(
    prompts: Sequence[str], valid_fraction: float, seed: int, *, most: int
) -> tuple[list[str], list[str]]:
    """Return the prompts for training and the distinct ones held out, at most so many, as
    split_by_prompt would; of more, those of the lowest hashes. Raises UserError where none is left
    for training."""
    _, out = split_by_prompt(distinct := list(dict.fromkeys(prompts)), valid_fraction, seed)
    chosen = set(sorted((distinct[index] for index in out), key=lambda p: _hash(p, seed))[:most])
    kept = [prompt for prompt in prompts if prompt not in chosen]
    if not kept:
        raise UserError(f"--data.valid-fraction {valid_fraction} holds out all prompts")
    return kept, [prompt for prompt in distinct if prompt in chosen]


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
