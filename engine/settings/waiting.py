"""How long ranks wait for one another. Imports neither torch nor megatron."""

from dataclasses import dataclass

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class WaitingConfig:
    """When a rank that does not come, or is heard of no more, ends the run. All our choice: a lost
    rank costs all GPUs no more than two minutes."""

    join_seconds: float = 90.0
    """For all ranks to have come once one has: importing torch takes seconds, from a slow file
    system a minute."""
    silence_seconds: float = 45.0
    """Of a rank that gives no sign of life, nine in that time: its process is stopped or gone. A
    machine that is overloaded ten times delays one by a second or two."""
    hang_minutes: float = 15.0
    """In which no rank comes any further within a phase of training, though all live: longer than a
    micro-batch, and than compiling kernels, take. 0: for ever."""
    orphan_seconds: float = 60.0
    """For a rank whose launcher is gone to come to a checkpoint, before it ends without."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "waiting.",
            positive="join_seconds silence_seconds",
            not_negative="hang_minutes orphan_seconds",
        )
