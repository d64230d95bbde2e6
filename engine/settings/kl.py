"""The KL penalty and its controller. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The per-token penalty that keeps the policy near the reference."""

    coef: float = 0.02
    """beta of InstructGPT eq. 2 (paper, C.4: 0.02)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate of the KL that is penalised; k1 = log(policy / reference) is eq. 2."""
    control: Literal["fixed", "adaptive"] = "fixed"
    """Fixed (paper), or Ziegler et al. 2019's controller, which steers coef towards target."""
    target: float = 6.0
    """Adaptive: nats a response, the sum over its tokens (Ziegler et al. 2019: 6)."""
    horizon: int = 10_000
    """Adaptive: responses over which coef moves by the proportional error (Ziegler et al. 2019:
    10,000)."""

    def __post_init__(self) -> None:
        check_numbers(self, "kl.", counts="horizon", positive="target", not_negative="coef")
