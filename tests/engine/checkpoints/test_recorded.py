import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.alarms import Alarms
from engine.checkpoints.recorded import check_counts, check_progress
from engine.evaluation.selection import best_epoch
from engine.settings.alarms import AlarmConfig
from engine.settings.kl import KLConfig
from engine.settings.spikes import SpikeConfig
from engine.training.spikes import SpikeWatch
from tests.engine.checkpoints.near_json import near
from tests.fuzzing import fuzzed

ALARMS = {"streaks": {"eos_rate": 2}, "first_length": 21.5, "value_loss": None}
PROGRESS = {
    "step": 8,
    "kl_coef": 0.02,
    "alarms": ALARMS,
    "metrics": {"train/loss": 1.5, "train/grad_norm": math.inf, "valid/loss": math.nan},
    "epochs": [{"epoch": 1, "step": 4, "reward": math.nan}, {"epoch": 2, "step": 8, "reward": 1.0}],
    "passed_over": 3,
    "rewinds": 1,
}
SPIKES = {"recent": {"gradient norm": [0.5, 2.0], "loss": []}, "spiked": {"total": 2}}
COUNTS = {
    "step": 8.0,
    "skipped": {"total": 1, "in_a_row": 0},
    "spikes": SPIKES,
    "grad_scaler": {"scale": 32768.0, "growth_tracker": 3, "hysteresis_tracker": -1},
}


def test_what_stages_write_is_taken():
    check_progress({"step": 0})
    check_progress(json.loads(json.dumps(PROGRESS)))
    config = AlarmConfig()
    alarms = Alarms(config, dtype="fp32", num_layers=2)
    alarms.check({"rollout/response_tokens": 3.0, "update/value_loss": 0.5, "score/kl": 1.0})
    check_progress({"step": 1, "alarms": json.loads(json.dumps(alarms.state_dict()))})
    check_progress({"step": 1, "kl_coef": KLConfig().coef, "metrics": {"a/b": 3}})
    check_counts(json.loads(json.dumps(COUNTS)), is_scaled=True)
    check_counts({"step": 0.0, "skipped": {}}, is_scaled=False)
    watch = SpikeWatch(SpikeConfig(policy="skip", loss_factor=2.0))
    watch.sees_spike(1.5, {"loss": 0.5})
    state = json.loads(json.dumps(watch.state_dict()))
    check_counts({"step": 0.0, "skipped": {}, "spikes": state}, is_scaled=False)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("step", [None, "8", 8.0, True, -1, 10**400, [8]]),
        ("kl_coef", [None, "0.1", True, math.nan, math.inf, 10**400, [0.1]]),
        ("metrics", [None, [], "x", {"a": "b"}, {"a": None}, {"a": [1.0]}, {"a": 10**400}]),
        ("epochs", [None, {}, "x", [3], [[]], [{}], [{"epoch": 1, "step": 2}]]),
        (
            "epochs",
            [[{"epoch": 1, "step": 2, "reward": "x"}], [{"epoch": 1.5, "step": 2, "reward": 1.0}]],
        ),
        ("alarms", [None, [], {}, "x", ALARMS | {"streaks": []}, ALARMS | {"streaks": {"a": "b"}}]),
        ("alarms", [ALARMS | {"first_length": "x"}, ALARMS | {"value_loss": math.nan}]),
        ("alarms", [{"streaks": {}}, ALARMS | {"streaks": {"a": 10**400}}]),
        ("passed_over", [None, "3", 3.0, True, -1, 10**400, [3]]),
        ("rewinds", [None, "1", 1.5, -1]),
    ],
)
def test_progress_of_other_types_is_refused(name: str, values: list):
    for value in values:
        with pytest.raises(ValueError, match="cannot be|have no") as error:
            check_progress(PROGRESS | {name: value})
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("step", [None, "8", -1.0, math.nan, math.inf, 10**400, [8], True]),
        ("skipped", [None, [], "x", {"total": "x"}, {"in_a_row": -1}, {"total": 1.5}]),
        ("spikes", [None, [], "x", {"recent": []}, {"recent": {"a": 1.0}}, {"spiked": []}]),
        ("spikes", [{"recent": {"a": [value]}} for value in (None, "x", math.nan, math.inf, True)]),
        ("spikes", [{"spiked": {"total": value}} for value in (None, "x", -1, 1.5)]),
        ("grad_scaler", [None, [], {}, {"scale": 1.0}]),
        *(
            ("grad_scaler", [COUNTS["grad_scaler"] | change])  # type: ignore[operator]
            for change in ({"scale": 0.0}, {"scale": -1.0}, {"scale": math.nan}, {"scale": "x"})
        ),
        ("grad_scaler", [COUNTS["grad_scaler"] | {"growth_tracker": 1.5}]),  # type: ignore[operator]
    ],
)
def test_counts_of_other_types_are_refused(name: str, values: list):
    for value in values:
        with pytest.raises(ValueError, match="cannot be"):
            check_counts(COUNTS | {name: value}, is_scaled=True)
        if name == "grad_scaler":
            check_counts(COUNTS | {name: value}, is_scaled=False)  # nobody reads it


def test_names_in_an_error_are_short_and_printable():
    for name in ("x" * 10**6, "\x1b]52;c;x\x07"):
        with pytest.raises(ValueError, match="metrics") as error:
            check_progress({"step": 1, "metrics": {name: None}})
        assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_watch_takes_what_was_checked(data: st.DataObject):
    spikes: Any = json.loads(json.dumps(data.draw(near(SPIKES))))
    try:
        check_counts(COUNTS | {"spikes": spikes}, is_scaled=True)
    except ValueError as error:
        assert len(str(error)) < 2_000 and len(str(error).splitlines()) == 1
        return
    watch = SpikeWatch(SpikeConfig(policy="skip", warmup=1))
    watch.load_state_dict(spikes)
    watch.sees_spike(1.0, {})
    assert watch.spiked.total >= 0


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_what_is_taken_can_be_resumed_from(data: st.DataObject):
    progress: Any = json.loads(json.dumps(data.draw(near(PROGRESS))))
    try:
        check_progress(progress)
    except ValueError as error:
        assert len(str(error)) < 2_000 and len(str(error).splitlines()) == 1
        return
    range(progress["step"] + progress.get("passed_over", 0) + progress.get("rewinds", 0), 10)
    best = best_epoch(progress.get("epochs", []))
    assert best is None or f"{best['epoch']:04d}"
    assert math.isfinite(progress.get("kl_coef", 0.0))
    if "alarms" in progress:
        alarms = Alarms(AlarmConfig(), dtype="fp32", num_layers=2)
        alarms.load_state_dict(progress["alarms"])
        alarms.check({"rollout/response_tokens": 9.0, "update/value_loss": 1.0, "score/kl": -9.0})
    assert all(isinstance(float(value), float) for value in progress.get("metrics", {}).values())
