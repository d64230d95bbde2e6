"""Which optimizer steps are spikes: a gradient norm, or a loss, far above those of the steps
before.

A spike is known before anything is applied, and its step leaves everything as it was. Judged are
numbers that are the same on all ranks, so all decide alike.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.settings.spikes import SpikeConfig
from engine.training.skipped import SkippedSteps


class Spike(NamedTuple):
    """A number that leapt."""

    name: str
    """gradient norm, or a loss by its name among the metrics."""
    value: float
    median: float
    """Of the steps before it."""


def losses_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the losses among a step's metrics that can be many times their median: PPO's policy
    loss has any sign, and is about 0."""
    return {n: v for n, v in metrics.items() if n.endswith("loss") and n != "policy_loss"}


class SpikeWatch:
    """Judges the steps of one network; its state belongs in the checkpoint, so that a resumed run
    judges as an uninterrupted one does."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.spiked = SkippedSteps(limit=config.max_in_a_row)
        self.found: list[Spike] = []
        """Since the last take()."""
        self._recent: dict[str, list[float]] = {}  # of steps that were taken, the latest last

    @property
    def has_to_stop(self) -> bool:
        """Whether no further step is to be taken before the stage has dealt with the spikes."""
        return bool(self.found) and (self.config.policy == "rewind" or self.spiked.is_stuck)

    @property
    def reads_losses(self) -> bool:
        """Whether losses are looked at before a step."""
        return self.config.policy != "none" and self.config.loss_factor > 0

    def sees_spike(self, norm: float, losses: Mapping[str, float]) -> bool:
        """Return whether a step is a spike, and remember its numbers where it is none.

        norm: of the gradient, before clipping, finite. losses: those that are looked at, by name.
        """
        if self.config.policy == "none":
            return False
        numbers = {"gradient norm": (norm, self.config.norm_factor)}
        numbers |= {name: (value, self.config.loss_factor) for name, value in losses.items()}
        spikes = [
            spike
            for name, (value, factor) in numbers.items()
            if (spike := self._spike(name, value, factor)) is not None
        ]
        self.spiked.count(was_skipped=bool(spikes), is_explained=False)
        self.found += spikes[:1]
        if not spikes:
            for name, (value, _) in numbers.items():
                if math.isfinite(value):
                    recent = [*self._recent.get(name, []), value]
                    self._recent[name] = recent[-self.config.window :]
        return bool(spikes)

    def take(self) -> list[Spike]:
        """Return the spikes since the last call."""
        found, self.found = self.found, []
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume continues from, as JSON has it."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "spiked": self.spiked.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state_dict() was taken, with the last of its numbers where the window has
        become smaller; from nothing where a checkpoint has none."""
        recent = state.get("recent", {})
        self._recent = {name: values[-self.config.window :] for name, values in recent.items()}
        self.spiked.load_state_dict(state.get("spiked", {}))
        self.found = []

    def _spike(self, name: str, value: float, factor: float) -> Spike | None:
        recent = self._recent.get(name, [])
        if len(recent) < self.config.warmup:
            return None
        median = statistics.median(recent)
        # Of numbers that are mostly 0, anything is many times the median.
        is_spike = math.isfinite(value) and 0 < median * factor < value
        return Spike(name, value, median) if is_spike else None
