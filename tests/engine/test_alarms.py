import json
import math
from typing import Any

import pytest

from engine.alarms import Alarms, LossAlarms
from engine.settings.alarms import AlarmConfig, LossAlarmConfig

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


PPO_CASES = [
    ("reward_spread", {"score__reward_mean": 0.4, "score__reward_std": 0.0}, "one reward"),
    ("reward_spread", {"score__reward_mean": 1e30, "score__reward_std": 1e21}, "one reward"),
    ("reward_scale", {"score__reward_mean": 2.0, "score__reward_std": 2e4}, "beyond 100"),
    ("reward_scale", {"score__reward_mean": -1e30, "score__reward_std": 1e29}, "beyond 100"),
    ("zero_gradient", {"update__policy_grad_norm": 0.0}, "policy_grad_norm is exactly 0"),
]


@pytest.mark.parametrize(("name", "changes", "words"), PPO_CASES)
def test_rewards_and_gradients_that_teach_nothing_are_said(name: str, changes: dict, words: str):
    alarms = new_alarms()
    values = SOUND | {key.replace("__", "/"): value for key, value in changes.items()}
    assert alarms.check(values) == alarms.check(values) == []
    found = {alarm.name: alarm.message for alarm in alarms.check(values)}
    assert words in found[name]


def test_steps_skipped_in_each_iteration_are_said_in_any_dtype():
    alarms = new_alarms("fp16")
    counts = [1.0, 1.0, 2.0, 5.0, 9.0]
    found = [names(alarms, update__policy_skipped_steps=count) for count in counts]
    assert found == [[], [], [], [], ["skipped_steps"]]
    again = new_alarms("fp16")
    again.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    assert again.state_dict() == alarms.state_dict()
    assert names(again) == []  # an iteration without updates counts nothing


SOUND_STEP = {
    "train/loss": 0.6,
    "train/grad_norm": 1.0,
    "train/skipped_steps": 0.0,
    "train/pair_accuracy": 0.65,
    "train/score_mean": 0.1,
    "train/score_std": 1.0,
}
STEP_CASES = [
    # What is wrong, in which step of the row it is said, and what is said.
    ("non_finite", {"valid/loss": math.nan}, 1, "valid/loss not finite"),
    ("zero_gradient", {"train/grad_norm": 0.0}, 3, "nothing is learned"),
    ("large_norm", {"train/grad_norm": 31.0}, 4, "is 31 in one step after the other"),
    ("score_spread", {"train/score_std": 1e-5, "train/loss": math.log(2)}, 4, "ln 2"),
    ("score_scale", {"train/score_mean": -1e30}, 4, "reach 1e+30"),
    ("loss_rise", {"train/loss": 3.0}, 4, "train/loss is 3, after a mean of"),
    ("chance", {"train/pair_accuracy": 0.3}, 10, "in the right order on average"),
]


def loss_alarms(**config: Any) -> LossAlarms:
    config = {"patience": 4, "chance_patience": 6, **config}
    return LossAlarms(LossAlarmConfig(**config), clip_norm=3.0)


def test_sound_steps_are_silent():
    alarms = loss_alarms()
    for i in range(200):
        noise = math.sin(i)
        values = {
            "train/loss": 0.6 + 0.4 * noise,
            "train/pair_accuracy": 0.56 + 0.2 * noise,
            "train/grad_norm": 20.0 + 20.0 * noise,
        }
        assert alarms.check(SOUND_STEP | values) == []


@pytest.mark.parametrize(("name", "changes", "number", "words"), STEP_CASES)
def test_a_step_that_learns_nothing_or_the_wrong_thing_is_said_after_patience(
    name: str, changes: dict, number: int, words: str
):
    alarms = loss_alarms()
    alarms.check(SOUND_STEP)
    found: list[tuple[int, str]] = []
    for step in range(1, 11):
        said = alarms.check(SOUND_STEP | changes)
        found += [(step, alarm.message) for alarm in said if alarm.name == name]
        assert {alarm.name for alarm in said} <= {name}
        # The state is all that the next step depends on.
        resumed = loss_alarms()
        resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
        alarms = resumed
    assert found[0][0] == number and words in found[0][1]


def test_a_run_of_skipped_steps_is_said_and_says_nothing_else():
    alarms = loss_alarms()
    bad = {"train/loss": math.nan, "train/grad_norm": math.nan}
    found = [
        [alarm.name for alarm in alarms.check(SOUND_STEP | bad | {"train/skipped_steps": n})]
        for n in range(1, 21)
    ]
    assert found == [["skipped_steps"] if n in (10, 20) else [] for n in range(1, 21)]
