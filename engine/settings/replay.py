"""Settings of a replay of a skipped step. Imports neither torch nor megatron."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.settings.layout import ParallelLayout
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """One skipped step, or rollout of a skipped iteration, rerun."""

    step: Path | None = None
    """Its folder, such as runs/sft/skipped/step_00000012_policy."""
    layout: ParallelLayout | None = None
    """Parallelism; none: the run's, or on a lone process none."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""
