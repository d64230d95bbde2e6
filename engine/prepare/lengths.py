"""How long texts are: the columns that the paper's tables of lengths have (app. A.3)."""

from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Measures = Mapping[str, Callable[[str], int]]
"""By unit: how many of them a text has."""
LENGTH_COLUMNS = ("mean", "std", "min", "25%", "50%", "75%", "max")


def measures_of(encode: Callable[[str], list[int]] | None) -> Measures:
    """Return what lengths are given in: tokens with a tokenizer, words and characters without."""
    if encode is not None:
        return {"tokens": lambda text: len(encode(text))}
    return {"words": lambda text: len(text.split()), "characters": len}


class Lengths:
    """Lengths of texts, by a name, in each measure: four bytes a text and measure."""

    def __init__(self, measures: Measures) -> None:
        self._measures = measures
        self._counts: dict[tuple[str, ...], array[int]] = {}

    def add(self, text: str, *names: tuple[str, ...]) -> None:
        """Count a text under each of the names."""
        for measure, count in self._measures.items():
            number = count(text)
            for name in names:
                self._counts.setdefault((*name, measure), array("I")).append(number)

    def summary(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Return by (*name, measure) the number of texts and LENGTH_COLUMNS of their lengths."""
        return {name: _summary(np.frombuffer(c, np.uint32)) for name, c in self._counts.items()}


def _summary(counts: np.ndarray) -> dict[str, Any]:
    lowest, first, middle, third, highest = np.percentile(counts, (0, 25, 50, 75, 100)).tolist()
    values = (float(counts.mean()), float(counts.std()), lowest, first, middle, third, highest)
    return {"n": len(counts)} | dict(
        zip(LENGTH_COLUMNS, (round(v, 2) for v in values), strict=True)
    )
