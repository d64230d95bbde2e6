import json
import math
from typing import Any

import pytest

from engine.alarms import Alarms
from engine.settings.alarms import AlarmConfig

SOUND = {
    "rollout/response_tokens": 40.0,
    "rollout/eos_rate": 0.97,
    "score/kl": 2.0,
    "score/logprob_mismatch_mean": 2e-7,
    "advantage/pad_leak": 0.0,
    "update/first_ratio_error": 1e-6,
    "update/clip_fraction": 0.1,
    "update/value_loss": 0.3,
    "update/policy_loss": -0.01,
    "update/policy_grad_norm": 1.0,
}


def new_alarms(dtype: str = "fp32", num_layers: int = 12, **config: Any) -> Alarms:
    return Alarms(AlarmConfig(**config), dtype=dtype, num_layers=num_layers)


def names(alarms: Alarms, **changes: float) -> list[str]:
    values = {key.replace("__", "/"): value for key, value in changes.items()}
    return [alarm.name for alarm in alarms.check(SOUND | values)]


def test_a_sound_run_is_silent():
    alarms = new_alarms()
    for i in range(20):
        noise = math.sin(i)
        assert names(alarms, score__kl=0.04 * noise, update__value_loss=0.3 + 0.2 * noise) == []


def test_absent_keys_are_not_checked():
    assert new_alarms().check({"train/loss": 2.0}) == []


@pytest.mark.parametrize(
    ("name", "key", "value", "likely_cause"),
    [
        ("logprob_mismatch", "score__logprob_mismatch_mean", 0.01, "stale weights"),
        ("first_ratio", "update__first_ratio_error", 0.02, "dropout"),
        ("pad_leak", "advantage__pad_leak", 1e-9, "outside response_mask"),
        ("non_finite", "update__policy_loss", math.nan, "update/policy_loss not finite"),
        ("non_finite", "score__kl", math.inf, "score/kl not finite"),
    ],
)
def test_exact_conditions_ring_at_once_and_name_the_cause(name, key, value, likely_cause):
    (alarm,) = new_alarms().check(SOUND | {key.replace("__", "/"): value})
    assert alarm.name == name
    assert likely_cause in alarm.message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("negative_kl", "score__kl", -0.3),
        ("large_kl", "score__kl", 80.0),
        ("eos_rate", "rollout__eos_rate", 0.1),
        ("clip_fraction", "update__clip_fraction", 0.8),
        ("non_finite_grad_norm", "update__policy_grad_norm", math.inf),
    ],
)
def test_noisy_conditions_ring_when_they_persist(name, key, value):
    alarms = new_alarms(patience=3)
    assert [names(alarms, **{key: value}) for _ in range(6)] == [[], [], [name]] * 2


def test_one_good_iteration_resets_the_count():
    alarms = new_alarms(patience=3)
    kls = [-1.0, -1.0, 1.0, -1.0, -1.0, 1.0]
    assert [names(alarms, score__kl=kl) for kl in kls] == [[]] * 6


def test_length_drift_is_measured_from_the_first_iteration_in_both_directions():
    for length in (200.0, 9.0):
        alarms = new_alarms(patience=1)
        assert names(alarms) == []
        assert names(alarms, rollout__response_tokens=length) == ["length_drift"]


def test_value_loss_explodes_against_its_own_mean():
    alarms = new_alarms()
    losses = [100.0, 30.0, 50.0, 20.0, 90.0]  # large but steady: a scale, no explosion
    assert [names(alarms, update__value_loss=loss) for loss in losses] == [[]] * 5
    assert names(alarms, update__value_loss=2000.0) == ["value_loss"]


def test_a_nan_rings_its_own_alarm_only():
    alarms = new_alarms(patience=1)
    assert names(alarms, score__kl=math.nan, update__value_loss=math.nan) == ["non_finite"]
    assert names(alarms) == []


def test_what_may_mismatch_grows_with_rounding_and_with_the_root_of_the_depth():
    def rings(value: float, dtype: str, num_layers: int) -> bool:
        found = names(new_alarms(dtype, num_layers), score__logprob_mismatch_mean=value)
        ratios = names(new_alarms(dtype, num_layers), update__first_ratio_error=10 * value)
        assert found == ["logprob_mismatch"] * bool(found)
        assert ratios == ["first_ratio"] * bool(found)
        return bool(found)

    for dtype, limit in (("fp16", 2.0**-9), ("bf16", 2.0**-6)):  # 4 units in the last place
        assert not rings(0.99 * limit, dtype, 1)
        assert rings(1.01 * limit, dtype, 1)
        assert not rings(3.99 * limit, dtype, 16)
        assert rings(4.01 * limit, dtype, 16)
    assert not rings(0.9e-4, "fp32", 96)  # sums of many terms, and not their rounding
    assert rings(1.1e-4, "fp32", 96)


def test_what_bf16_was_measured_to_mismatch_rings_nothing():
    # Mean of 768 tokens, 12 layers of width 768, sampled against scored: 0.009 and 0.023 nats for
    # weights of deviations 0.02 and 0.04; two packings of one rollout: 0.11 at most.
    measured = {"score__logprob_mismatch_mean": 0.0229, "update__first_ratio_error": 0.108}
    assert names(new_alarms("bf16", 12), **measured) == []


def test_state_survives_a_checkpoint():
    alarms = new_alarms(patience=2)
    names(alarms, score__kl=-1.0, rollout__response_tokens=10.0)
    resumed = new_alarms(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    changes = {"score__kl": -1.0, "rollout__response_tokens": 90.0, "update__value_loss": 9.0}
    assert names(resumed, **changes) == names(alarms, **changes) == ["negative_kl", "value_loss"]
    assert names(resumed, **changes) == names(alarms, **changes) == ["length_drift"]
