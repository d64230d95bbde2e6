"""When a number of a step or iteration is called wrong. Imports neither torch nor megatron."""

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
    max_reward: float = 100.0
    """Size of the mean reward, and of its spread. A ranking loss makes differences of a few, and a
    KL penalty of some nats times 0.02 is nothing beside hundreds."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "alarms.",
            counts="patience",
            positive="max_kl max_length_drift value_loss_factor max_reward",
            shares="min_eos_rate max_clip_fraction",
        )


@dataclass(frozen=True, kw_only=True)
class LossAlarmConfig:
    """When a number of a step of SFT, pretraining or the reward model is called wrong. Every value
    is our choice."""

    patience: int = 20
    """Steps in a row before a condition that chance can bring about is reported."""
    loss_factor: float = 2.0
    """Factor by which a loss may exceed its running mean, and by 0.5 nats at least: beyond it for
    `patience` steps is no bad batch."""
    max_norm_factor: float = 10.0
    """Factor by which the gradient's norm may exceed clip_norm in every step: beyond it clipping
    sets the length of all of them, and the learning rate is not the one that was asked for."""
    min_pair_accuracy: float = 0.52
    """Running mean of the share of pairs in the right order; 0.5 is chance."""
    chance_patience: int = 100
    """Steps in a row that the mean may stay below it: a reward model has learned its first pairs
    well before."""
    max_score: float = 100.0
    """Size of a reward model's mean score, and of its spread; as max_reward in PPO."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "alarms.",
            counts="patience chance_patience",
            positive="loss_factor max_norm_factor max_score",
            shares="min_pair_accuracy",
        )
