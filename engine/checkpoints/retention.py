"""Which of a run's checkpoints are kept when a new one is whole. Imports neither torch nor
megatron."""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import read_object

_STEP = re.compile(r"step_(\d{8,12})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """A checkpoint is kept that any of these keeps; the newest always is."""

    last: int
    """The last so many."""
    every: int = 0
    """Those of steps that this divides; 0: none for that."""
    lowest: str = ""
    """That with the lowest value of this metric, the latest of equal ones; none: none for that."""
    highest: str = ""
    """That with the highest."""
    newest_of: int = 0
    """The newest of steps that this divides; 0: none for that."""

    def kept(self, metrics_of: dict[int, dict[str, Any]]) -> set[int]:
        """Return the steps to keep of those given, each with the metrics it was saved with."""
        steps = sorted(metrics_of)
        found = set(steps[-max(1, self.last) :])
        if self.every:
            found |= {step for step in steps if step % self.every == 0}
        if self.newest_of:
            found |= set([step for step in steps if step % self.newest_of == 0][-1:])
        for name, sign in ((self.lowest, -1), (self.highest, 1)):
            values = {step: metrics_of[step].get(name) for step in steps}
            rated = [step for step in steps if _is_finite(values[step])]
            if name and rated:
                found.add(max(rated, key=lambda step: (sign * values[step], step)))  # type: ignore[operator]
        return found

    def missing(self, metrics: Collection[str]) -> dict[str, str]:
        """Return in words, by the metrics that checkpoints are kept by and a new one does not have,
        which it has; the nearest names first."""
        names = {name for name in (self.lowest, self.highest) if name and name not in metrics}
        return {name: _in_words(name, metrics) for name in sorted(names)}


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint's name says, None where it is no step's."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def superseded(
    directory: Path, newest: int, retention: Retention, damaged: Collection[int] = ()
) -> list[Path]:
    """Return the checkpoints in a folder that go now that of step `newest` is whole.

    Those of later steps stay: the run was set back, and will come to them again. damaged: steps
    whose checkpoints count for nothing.
    """
    found = {step_of(path.name): path for path in directory.iterdir()}
    older = {s: path for s, path in found.items() if s is not None and s <= newest}
    sound = {step: path for step, path in older.items() if step not in {*damaged} - {newest}}
    kept = retention.kept({step: _metrics_in(path) for step, path in sound.items()})
    return [path for step, path in sorted(older.items()) if step not in kept | {newest}]


def _metrics_in(folder: Path) -> dict[str, Any]:
    """Return the metrics that a checkpoint was saved with, none where they cannot be read."""
    try:
        metrics = read_object(folder / "progress.json").get("metrics")
    except (UserError, OSError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _in_words(missing: str, metrics: Collection[str]) -> str:
    def distance(name: str) -> tuple[float, str]:
        return -difflib.SequenceMatcher(None, missing, name).ratio(), name

    there = f"has {', '.join(sorted(metrics, key=distance))}" if metrics else "has none"
    return (
        f"checkpoints are to be kept by {missing}, a metric which not every step that is saved "
        f"has; this one {there}: name one of these, or give an --eval-every that divides "
        "--save-every, where only a step with an evaluation has it"
    )


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # of a whole number beyond all floats
        return False
