"""Tokenised sequences: what a batch is made of, and which are short enough to be in one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

from engine.data.prompt_format import Prompt, Reply
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError, quoted

TRAINED = "trained"
"""A field of examples [n] bool: which tokens behind the prompt are predicted; without it, all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One tokenised sequence."""

    tokens: np.ndarray
    """[n] int64: the prompt's with what begins a text, then the response's, then in training data
    the end of text."""
    prompt_length: int
    """tokens[prompt_length:] are predicted, but for those that the field TRAINED leaves out. It is
    1 for plain text, whose first token nothing predicts, and n for a bare prompt."""
    fields: Mapping[str, np.ndarray | float | int] = field(default_factory=dict)
    """Values that travel along: an array [n] has one a token, a number is one for the sequence."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"prompt_length {self.prompt_length} is not within 1 to {len(self.tokens)} tokens"
            )

    @property
    def num_given(self) -> int:
        """Tokens that are not predicted."""
        if TRAINED not in self.fields:
            return self.prompt_length
        trained = np.asarray(self.fields[TRAINED])[self.prompt_length :]
        return len(self.tokens) - int(trained.sum())


# What must stay in one micro-batch: one sequence, or the K completions of one prompt, whose ranking
# loss needs all K scores.
Unit = Example | Sequence[Example]
AnyUnit = TypeVar("AnyUnit", bound=Unit)


Shape = tuple[int, int]
"""A sequence's tokens and those among them that are not predicted: all that a plan needs of it."""


def sequences_of(unit: Unit) -> Sequence[Example]:
    """Return the sequences of a unit."""
    return [unit] if isinstance(unit, Example) else unit


TooLong = Literal["drop", "cut-left", "cut-right"]
"""What becomes of a unit that is too long."""
CUT_OPTION = "--data.too-long"
"""The stages' option that says so."""


def begins_alike(sequences: Sequence[Example]) -> bool:
    """Return whether sequences have the same prompt, and each one tokens behind it."""
    prompts = [sequence.tokens[: sequence.prompt_length] for sequence in sequences]
    return all(
        np.array_equal(prompt, prompts[0]) and len(sequence.tokens) > len(prompt)
        for prompt, sequence in zip(prompts, sequences, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """What drop_long kept."""

    kept: list[int]
    """Positions, in the list that was given, of the units that were kept."""
    num_long_prompts: int
    """Units dropped because their prompt is over its limit."""
    num_long_sequences: int
    """Units dropped because prompt and response together are over the limit."""
    num_cut: int = 0
    """Units kept without a part of their tokens."""

    @property
    def num_dropped(self) -> int:
        """Units that were too long."""
        return self.num_long_prompts + self.num_long_sequences


def drop_long(
    units: Sequence[AnyUnit],
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: TooLong = "drop",
    num_first: int = 0,
) -> tuple[list[AnyUnit], LengthReport]:
    """Return the units within the limits (in tokens), in order, and what was dropped.

    A unit of several sequences goes when one of them is too long. Where none is left, the caller
    knows whether that matters (engine/data/limits.py).

    too_long: "cut-left", a prompt loses its beginning, behind the num_first tokens that begin a
    text, until all of the unit fits; "cut-right", a response loses its end, the end of text with
    it. What fits by no such cut is dropped.
    """
    prompt_limit = max_length if max_prompt_length is None else max_prompt_length
    kept: list[int] = []
    fitting: list[AnyUnit] = []
    num_long_prompts, num_cut = 0, 0
    for index, unit in enumerate(units):
        whole = unit
        if too_long == "cut-left":
            unit = _cut_left(unit, max_length, prompt_limit, num_first)
        elif too_long == "cut-right":
            unit = _cut_right(unit, max_length)
        sequences = sequences_of(unit)
        if any(sequence.prompt_length > prompt_limit for sequence in sequences):
            num_long_prompts += 1
        elif all(len(sequence.tokens) <= max_length for sequence in sequences):
            kept.append(index)
            fitting.append(unit)
            num_cut += unit is not whole
    report = LengthReport(
        kept=kept,
        num_long_prompts=num_long_prompts,
        num_long_sequences=len(units) - len(kept) - num_long_prompts,
        num_cut=num_cut,
    )
    return fitting, report


def _cut_left(unit: AnyUnit, max_length: int, prompt_limit: int, num_first: int) -> AnyUnit:
    """Return a unit whose prompt has lost as much of its beginning as makes every sequence fit;
    the unit itself where nothing has to go, or more than there is."""
    sequences = sequences_of(unit)
    excess = max(
        max(each.prompt_length - prompt_limit, len(each.tokens) - max_length) for each in sequences
    )
    shortest = min(each.prompt_length for each in sequences)
    if excess <= 0 or shortest - num_first - excess < 1:
        return unit
    cut = [
        _without(each, slice(num_first, num_first + excess), each.prompt_length - excess)
        for each in sequences
    ]
    return cut[0] if isinstance(unit, Example) else cut  # type: ignore[return-value]


def _cut_right(unit: AnyUnit, max_length: int) -> AnyUnit:
    """Return a sequence without the end of its response; the unit itself where that is within the
    limit, or has no room for a token."""
    if not isinstance(unit, Example) or not unit.prompt_length < max_length < len(unit.tokens):
        return unit
    return _without(unit, slice(max_length, None), unit.prompt_length)  # type: ignore[return-value]


def _without(example: Example, gone: slice, prompt_length: int) -> Example:
    """Return an example without some of its tokens, and without their values in its fields."""
    fields = {
        name: np.delete(value, gone) if isinstance(value, np.ndarray) else value
        for name, value in example.fields.items()
    }
    tokens = np.delete(example.tokens, gone)
    return replace(example, tokens=tokens, prompt_length=prompt_length, fields=fields)


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    too_long: TooLong = "drop",
    option: str = CUT_OPTION,
) -> Iterator[np.ndarray]:
    """Yield [n] int64 for each prompt: what begins a text, where the tokenizer has that, and its
    own tokens with those of its suffix; or those that it has already. UserError where some are
    dialogues, and are to lose their beginning by the option."""
    dialogues = [prompt.text for prompt in prompts if prompt.is_dialogue]
    if too_long == "cut-left" and dialogues:
        raise UserError(
            f"{option} cut-left is for plain texts: {len(dialogues)} of {len(prompts)} prompts are "
            "read as messages, whose beginning says who speaks, the first "
            f"{quoted(dialogues[0])}; give {option} drop"
        )
    plain = tokenizer.encode_all(p.text + p.suffix for p in prompts if p.tokens is None)
    for prompt in prompts:
        if prompt.tokens is None:
            yield np.asarray([*tokenizer.bos_ids, *next(plain)], dtype=np.int64)
        else:
            yield prompt.tokens


def encode_replies(replies: Sequence[Reply], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield [n] int64 for each reply: its tokens and the end of text; or those that it has already,
    which a chat template has ended."""
    plain = tokenizer.encode_all(reply.text for reply in replies if reply.tokens is None)
    for reply in replies:
        if reply.tokens is None:
            yield np.asarray([*next(plain), tokenizer.eos_id], dtype=np.int64)
        else:
            yield reply.tokens
