"""The KL penalty and its controller. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.settings.checks import check_numbers

MAX_KL_ERROR = 0.2
"""Adaptive: where the proportional error is cut, either way (Ziegler et al. 2019)."""


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
        if self.control == "adaptive" and self.coef == 0:
            raise UserError("--kl.coef 0 stays 0 whatever --kl.control adaptive multiplies it by")

    def check_batch(self, num_responses: int) -> None:
        """Raise UserError where an iteration of so many responses could turn coef to 0 or below: a
        negative one would pay for KL."""
        most = MAX_KL_ERROR * num_responses
        if self.control == "adaptive" and self.horizon <= most:
            raise UserError(
                f"--kl.horizon {self.horizon} must be over {MAX_KL_ERROR} x --rollout-batch-size "
                f"{num_responses} = {most:g}: the coefficient's factor, 1 - {MAX_KL_ERROR} x "
                "--rollout-batch-size / --kl.horizon at the least, must stay positive"
            )
