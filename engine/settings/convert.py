"""Settings of a conversion from Hugging Face or to it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from engine.settings.checks import check_numbers
from engine.settings.layout import ParallelLayout
from engine.settings.waiting import WaitingConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """One conversion."""

    direction: tyro.conf.Positional[Literal["import", "export"]]
    """import: from Hugging Face to a run; export: from a run to Hugging Face."""
    source: Path | None = None
    """import: the model's folder; export: a run, one of its checkpoints, or a network in one."""
    out: Path | None = None
    """The folder to make; it must not exist."""
    role: Literal["policy", "ema", "reward_model", "critic"] | None = None
    """Which network of the checkpoint; none: import: what the folder's class says; export: the
    policy, or where there is none the reward model or critic."""
    strict: bool = False
    """export: refuse a run whose newest checkpoint is damaged, instead of taking the newest whole
    one."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; none: the one that lies with the source."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the weights that are written; fp32 holds the others exactly."""
    file_gigabytes: float = 5.0
    """export: largest file of weights, in 10^9 bytes (huggingface_hub's own choice)."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Ranks that share the model while it is converted; the result is the same under any."""
    waiting: WaitingConfig = field(default_factory=WaitingConfig)
    """How long ranks wait for one that does not come or is silent."""

    def __post_init__(self) -> None:
        check_numbers(self, positive="file_gigabytes")
