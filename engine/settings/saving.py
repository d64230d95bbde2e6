"""When a run's checkpoints are written, which are kept, and what becomes of damaged ones. Imports
neither torch nor megatron."""

from dataclasses import dataclass

from engine.errors import UserError
from engine.settings.checks import check_numbers, option_of


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints of one run; its newest is always kept."""

    save_every: int = 0
    """Steps or iterations between checkpoints; 0: none is due for the steps, but at the end."""
    save_every_minutes: float = 15.0
    """Minutes between checkpoints, by the first rank's clock; 0: none is due for the time. Our
    choice: the most work that a killed run loses, and a write that a run does not notice."""
    keep: int = 2
    """Checkpoints kept, the last so many; our choice. With 1 the one before stays until a step was
    taken from the newest, which shows that its weights are good."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept besides; 0: none."""
    keep_lowest: str = ""
    """That with the lowest value of this metric is kept besides, such as valid/loss; none: none."""
    keep_highest: str = ""
    """That with the highest value of this metric is kept besides, such as valid/reward_mean."""
    keep_skipped: int = 2
    """Skipped steps and iterations, the last so many, whose batch and weights RUN/skipped keeps for
    recipes/replay.py; of several in a row the first. Our choice, as of checkpoints; 0: none."""
    save_in_background: bool = True
    """Train on while a checkpoint is written, from a copy in host memory. A run that is killed
    meanwhile goes on from the one before."""
    strict: bool = False
    """Refuse a damaged newest checkpoint, instead of going on from the newest whole one."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            counts="keep",
            not_negative="save_every save_every_minutes keep_every keep_skipped",
        )
        for name in ("keep_lowest", "keep_highest"):
            metric = getattr(self, name)
            if metric and not (metric.isprintable() and "/" in metric):
                raise UserError(
                    f"{option_of(name)} must name a metric such as valid/loss, got {metric!r}"
                )
