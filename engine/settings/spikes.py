"""What is done about a loss or a gradient that leaps. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.settings.checks import check_numbers, option_of


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What a spike is, and what is done about it; every value is our choice unless it says
    another."""

    policy: Literal["none", "skip", "rewind"] = "none"
    """none: take every step, as InstructGPT and GPT-3, which say nothing of spikes; the norm is
    clipped anyway. skip: leave the step out. rewind: go back to the newest checkpoint, and pass
    over what was fed since (PaLM, 5.1: about 100 steps back, over 200 to 500 batches)."""
    norm_factor: float = 10.0
    """A gradient norm before clipping is a spike above so many times its median. Heavy tails of
    sound runs stay below; batches that break a run are far above."""
    loss_factor: float = 0.0
    """So is a loss above so many times its median, but for PPO's of the policy, which is about 0;
    0: no loss is looked at. Costs a wait for the device before each optimizer step."""
    window: int = 128
    """The median is that of the last so many steps that were taken (as long as the window of
    OLMo-core's SkipStepOptimizer)."""
    warmup: int = 32
    """So many steps are taken before any is judged: first ones are large."""
    max_in_a_row: int = 5
    """Steps of one network left out in a row before the run ends. A bad batch passes; what stays
    is a new level, and leaving out steps, which change nothing, leads nowhere."""
    extra_batches: int = 0
    """Batches, or iterations' prompts, that a rewind passes over behind the spike's own."""
    max_rewinds: int = 20
    """Rewinds of a run before it ends (PaLM, 5.1: roughly 20 spikes in its largest run)."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "spikes.",
            counts="window warmup max_in_a_row max_rewinds",
            positive="norm_factor",
            not_negative="loss_factor extra_batches",
        )
        for name in ("norm_factor", "loss_factor"):
            if 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"{option_of(f'spikes.{name}')} must be above 1, got {getattr(self, name)}: "
                    "half of all steps are above their median"
                )
        if self.warmup > self.window:
            raise UserError(
                f"--spikes.warmup {self.warmup} is more than the --spikes.window {self.window} "
                "that is remembered: no step would be judged"
            )
