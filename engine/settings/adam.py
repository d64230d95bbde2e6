"""Adam and its learning-rate schedule. Imports neither torch nor megatron."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam and its schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Cosine to final_fraction x lr over the run (paper: SFT, RM), or constant after the warm-up
    (paper: PPO)."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a fraction of lr (paper, C.1 and C.2: 10%)."""
    warmup: int = 0
    """Steps (PPO: iterations) of linear warm-up (paper: none for SFT, 10 iterations for PPO,
    C.4)."""
    warmup_start: float = 0.1
    """Where the warm-up starts, as a fraction of lr (paper, C.4: a tenth)."""
    beta1: float = 0.9
    """First moment decay (paper, app. C)."""
    beta2: float = 0.95
    """Second moment decay (paper, app. C)."""
    epsilon: float = 1e-8
    """Adam's epsilon; not stated for RLHF, our choice: GPT-3's."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; not stated for RLHF, our choice: none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; not stated for RLHF, our choice: GPT-3's."""
    max_skipped_steps: int = 5
    """Steps in a row whose gradient is not finite before the run ends; each is skipped. Our choice:
    a bad batch or a flipped bit passes in a step or two. What lasts longer will not pass, since
    the weights stay the same. Of fp16's steps only those at its smallest loss scale count."""
    min_loss_scale: float = 1.0
    """In fp16, the smallest scale of the losses (megatron's default). Our choice: at 1 nothing is
    scaled, and a gradient that is too large then is so by itself."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "optimizer ",
            counts="max_skipped_steps",
            positive="lr epsilon clip_norm min_loss_scale",
            not_negative="warmup weight_decay",
            shares="final_fraction warmup_start beta1 beta2",
        )
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1.0:  # Adam divides by 1 - beta^t
                raise UserError(f"optimizer {name} must be below 1, got 1.0")
