"""When a number of a PPO iteration is called wrong. Imports neither torch nor megatron."""

from dataclasses import dataclass

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """When a number of an iteration is called wrong. Every value is our choice."""

    patience: int = 3
    """Iterations in a row before a condition that chance can bring about is reported."""
    min_kl: float = -0.05
    """Nats a response: an estimate below it, `patience` times in a row, is not of a KL."""
    max_kl: float = 50.0
    """Nats a response: beyond it the policy has left the region that the reward model knows."""
    min_eos_rate: float = 0.5
    """Share of responses that must end by themselves and not at the length limit."""
    max_length_drift: float = 4.0
    """Factor by which the mean response length may leave that of the first iteration."""
    max_clip_fraction: float = 0.5
    """Share of tokens whose ratio may leave [1 - cliprange, 1 + cliprange]."""
    value_loss_factor: float = 10.0
    """Factor by which the value loss may exceed its running mean."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "alarms.",
            counts="patience",
            positive="max_kl max_length_drift value_loss_factor",
            shares="min_eos_rate max_clip_fraction",
        )
