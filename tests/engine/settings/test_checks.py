import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.settings.checks import check_epochs, check_numbers, check_values


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


@dataclass(frozen=True, kw_only=True)
class Part:
    path: Path | None = None
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    stage: Part = field(default_factory=Part)
    text: str = ""
    seed: int = 0


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        (Job(seed=10**30), "seed must be within 2^62, got 1000"),
        (Job(seed=-(2**62)), "seed must be within 2^62, got -46"),
        (Job(seed=10**5000), "seed must be within 2^62, got a number of thousands of digits"),
        (Job(text="a\udcff"), "text must be valid UTF-8, got 'a\\udcff'"),
        (Job(text="a" * 10**6), "text must have at most 65536 characters, got 'aaa"),
        (Job(stage=Part(path=Path("\ud800"))), "path must be valid UTF-8, got '\\ud800'"),
        (Job(stage=Part(path=Path("a\0b"))), "path must be a path, of at most 3072 bytes and with"),
        (Job(stage=Part(path=Path("a/" * 2000))), "path must be a path, of at most 3072 bytes"),
        (Job(stage=Part(path=Path("\u00e9" * 128))), "path must be a path of names of at most 255"),
        (Job(stage=Part(numbers=(1.0, math.nan))), "numbers must be finite, got nan"),
        (Job(stage=Part(numbers=(math.inf,))), "numbers must be finite, got inf"),
    ],
)
def test_what_no_run_could_hold_is_named(job: Job, cause: str):
    with pytest.raises(UserError) as error:
        check_values(job, nameless=("stage",))
    assert str(error.value).startswith(f"--{cause}")
    assert len(str(error.value)) < 300


def test_what_a_run_can_hold_is_silent():
    part = Part(path=Path("/\u00e9" * 100), numbers=(-math.inf, 1e308, 0.0))
    check_values(Job(stage=part, text="\0\n\u202e", seed=2**62 - 1))
    check_epochs(1e9)
    with pytest.raises(UserError, match=r"epochs must be at most 1e\+09, got 1e\+308"):
        check_epochs(1e308)
