"""A stage's config with a field of every kind, and a run of it that must fail."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from engine.errors import UserError
from engine.recipe import run_stage


class Rule(enum.Enum):
    penalty = 1
    replace = 2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: Path | None = None
    """Where the examples are."""
    skip_bad_lines: bool = False
    """Count bad lines instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    data: DataConfig = DataConfig()
    """What it reads."""
    lr: float = 1e-3
    """Peak learning rate."""
    steps: int = 10
    """Optimizer steps."""
    mode: Literal["fixed", "adaptive"] = "fixed"
    """How the coefficient moves."""
    rule: Rule = Rule.penalty
    """What happens without an end token."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decays."""
    seeds: tuple[int, ...] = ()
    """One run each."""
    weights: dict[str, float] | None = None
    """By name."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1")


def fails_with(capsys, arguments: list[str], train=lambda config: None) -> str:
    with pytest.raises(SystemExit) as stop:
        run_stage(train, StageConfig(), arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message
