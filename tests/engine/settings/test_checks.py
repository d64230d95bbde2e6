import math
from dataclasses import dataclass

import pytest

from engine.errors import UserError
from engine.settings.checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class Numbers:
    steps: int = 3
    rate: float = 0.5
    floor: int = 0
    share: float | None = 0.25

    def __post_init__(self) -> None:
        check_numbers(
            self, "data.", counts="steps", positive="rate", not_negative="floor", shares="share"
        )


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"steps": 0}, r"data\.steps must be at least 1, got 0"),
        ({"rate": 0.0}, r"data\.rate must be positive, got 0\.0"),
        ({"rate": -1.0}, r"data\.rate must be positive, got -1\.0"),
        ({"rate": math.nan}, r"data\.rate must be positive, got nan"),
        ({"rate": math.inf}, r"data\.rate must be finite, got inf"),
        ({"floor": -1}, r"data\.floor must be at least 0, got -1"),
        ({"share": 1.01}, r"data\.share must be from 0 to 1, got 1\.01"),
        ({"share": -0.1}, r"data\.share must be from 0 to 1, got -0\.1"),
    ],
)
def test_numbers_outside_their_limits_are_errors(change, cause):
    with pytest.raises(UserError, match=cause):
        Numbers(**change)


def test_numbers_at_their_limits_and_absent_ones_are_silent():
    for share in (0.0, 1.0, None):
        Numbers(steps=1, rate=1e-30, share=share)
