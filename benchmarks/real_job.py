"""A step of SFT or of the reward model on records of real lengths: what every provider is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.lengths import Row
from engine.data.examples import Example, Unit, sequences_of
from engine.settings.adam import AdamConfig
from engine.settings.numerics import Numerics
from models.sizes import GPTSize

ADAM = AdamConfig(lr=1e-5, schedule="constant")
PAD = 0
"""The token that fills padded rows up; no record has it."""


@dataclass(frozen=True, kw_only=True)
class RealJob:
    """Optimizer steps on global batches that all providers read alike.

    The first step makes what lasts and is compared; then every batch is timed num_rounds times, and
    once more under the memory's meter.
    """

    task: str
    """ "sft": a unit is a demonstration; "rm": the K completions of a prompt, with their ranks."""
    size: GPTSize
    numerics: Numerics
    batches: Sequence[Sequence[Unit]]
    num_rounds: int
    passes: Sequence[int]
    """Into how many micro-batches a provider may cut a batch; it takes what is fastest for it."""

    @property
    def num_timed(self) -> int:
        """Steps that are timed."""
        return len(self.batches) * self.num_rounds

    @property
    def num_steps(self) -> int:
        """All steps."""
        return 1 + self.num_timed + len(self.batches)

    def batch_number(self, step: int) -> int:
        """Return which batch a step reads: the first step that of the second."""
        return max(0, step - 1) % len(self.batches)

    def is_metered(self, step: int) -> bool:
        """Return whether a step's memory is measured, and not its time."""
        return step > self.num_timed

    def units(self, step: int) -> Sequence[Unit]:
        """Return the units of a step's global batch."""
        return self.batches[self.batch_number(step)]


def make_batches(
    task: str, size: GPTSize, rows: Sequence[Row], *, num_batches: int
) -> list[list[Unit]]:
    """Return batches of random tokens with the rows' lengths, one row a unit; the same at every
    call. Ranks are a random order without ties."""
    draw = np.random.default_rng(1)

    def text(length: int) -> np.ndarray:
        return draw.integers(PAD + 1, size.vocab_size, length)

    units: list[Unit] = []
    for prompt_length, *responses in rows:
        prompt, ranks = text(prompt_length), draw.permutation(len(responses)) + 1
        unit = [
            Example(
                tokens=np.concatenate([prompt, text(length)]),
                prompt_length=prompt_length,
                fields={} if task == "sft" else {"ranks": int(rank)},
            )
            for length, rank in zip(responses, ranks, strict=True)
        ]
        units.append(unit[0] if task == "sft" else unit)
    batch_size = len(units) // num_batches
    return [units[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]


def num_tokens(units: Sequence[Unit]) -> int:
    """Return the tokens of all sequences of the units."""
    return sum(len(sequence.tokens) for unit in units for sequence in sequences_of(unit))


def num_sequences(units: Sequence[Unit]) -> int:
    """Return how many sequences the units have."""
    return sum(len(sequences_of(unit)) for unit in units)


def num_targets(units: Sequence[Unit]) -> int:
    """Return how many tokens the units predict."""
    return sum(
        len(sequence.tokens) - sequence.prompt_length
        for unit in units
        for sequence in sequences_of(unit)
    )
