import math

import pytest

from engine.errors import UserError
from engine.settings.alarms import AlarmConfig


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"patience": 0}, "alarms.patience must be at least 1, got 0"),
        ({"max_kl": 0.0}, "alarms.max-kl must be positive, got 0.0"),
        ({"max_length_drift": -1.0}, "alarms.max-length-drift must be positive, got -1.0"),
        ({"value_loss_factor": math.inf}, "alarms.value-loss-factor must be finite, got inf"),
        ({"min_eos_rate": 1.5}, "alarms.min-eos-rate must be from 0 to 1, got 1.5"),
        ({"max_clip_fraction": -0.5}, "alarms.max-clip-fraction must be from 0 to 1, got -0.5"),
    ],
)
def test_a_limit_that_means_nothing_is_an_error(change: dict[str, float], cause: str):
    with pytest.raises(UserError) as error:
        AlarmConfig(**change)
    assert str(error.value) == f"--{cause}"


def test_limits_that_are_never_reached_turn_an_alarm_off():
    AlarmConfig(min_eos_rate=0.0, max_clip_fraction=1.0, min_kl=-math.inf)
