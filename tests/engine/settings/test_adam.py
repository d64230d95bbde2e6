import dataclasses
import math

import pytest

from engine.errors import UserError
from engine.settings.adam import AdamConfig


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "positive"),
        ("epsilon", 0.0, "positive"),
        ("clip_norm", -1.0, "positive"),
        ("warmup", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("beta2", 1.5, "from 0 to 1"),
        ("beta1", 1.0, "below 1"),
        ("beta2", 1.0, "below 1"),
        ("warmup_start", 2.0, "from 0 to 1"),
        ("final_fraction", math.nan, "from 0 to 1"),
        ("max_skipped_steps", 0, "at least 1"),
    ],
)
def test_number_that_means_nothing_is_refused(name: str, value: float, rule: str):
    with pytest.raises(UserError, match=f"optimizer {name} must be {rule}, got"):
        dataclasses.replace(AdamConfig(), **{name: value})


def test_numbers_at_their_limits_are_taken():
    found = AdamConfig(
        weight_decay=0.0, warmup=0, warmup_start=1.0, final_fraction=0.0, beta1=0.0, beta2=0.9999
    )
    assert (found.warmup_start, found.beta1) == (1.0, 0.0)


def test_what_is_not_said_is_the_papers():
    found = AdamConfig()
    assert (found.beta1, found.beta2) == (0.9, 0.95)  # app. C
    assert (found.schedule, found.final_fraction) == ("cosine", 0.1)  # C.1, C.2
    assert found.warmup_start == 0.1  # C.4
