"""The numbers that a checkpoint has beside its tensors, held to what a stage resumes from.

A checkpoint may come from elsewhere: what is of another type would fail long after it was read, or
be trained on. Imports neither torch nor megatron.
"""

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import named, quoted

_LARGEST = 1 << 53  # of a count: beyond, not every one is a float


def check_progress(progress: Mapping[str, Any]) -> None:
    """Raise ValueError unless a progress.json has what a stage may read in it, of the right
    types."""
    _check_count(progress.get("step"), "step")
    if "kl_coef" in progress:
        _check_number(progress["kl_coef"], "kl_coef", is_finite=True)
    for name, value in _items(progress.get("metrics", {}), "metrics"):
        _check_number(value, f"metrics.{named(name)}")
    epochs = progress.get("epochs", [])
    if not isinstance(epochs, list):
        raise ValueError(f"epochs cannot be {quoted(epochs)}")
    for epoch in epochs:
        found = dict(_items(epoch, "epochs"))
        _check_count(found.get("epoch"), "epoch")
        _check_count(found.get("step"), "step")
        _check_number(found.get("reward"), "reward")
    for name in ("passed_over", "rewinds"):
        _check_count(progress.get(name, 0), name)
    if "alarms" in progress:
        _check_alarms(dict(_items(progress["alarms"], "alarms")))


def check_counts(counts: Mapping[str, Any], *, is_scaled: bool) -> None:
    """Raise ValueError unless the counts of an optimizer are what it writes; is_scaled: with the
    state of a loss scale."""
    _check_number(counts.get("step"), "step", is_finite=True, least=0.0)
    for name, value in _items(counts.get("skipped"), "skipped"):
        _check_count(value, f"skipped.{named(name)}")
    spikes = dict(_items(counts.get("spikes", {}), "spikes"))
    for name, value in _items(spikes.get("spiked", {}), "spiked"):
        _check_count(value, f"spiked.{named(name)}")
    for name, values in _items(spikes.get("recent", {}), "recent"):
        if not isinstance(values, list):
            raise ValueError(f"recent.{named(name)} cannot be {quoted(values)}")
        for value in values:
            _check_number(value, f"recent.{named(name)}", is_finite=True)
    if is_scaled:
        scaler = dict(_items(counts.get("grad_scaler"), "grad_scaler"))
        _check_number(scaler.get("scale"), "scale", is_finite=True, least=math.ulp(0.0))
        for name in ("growth_tracker", "hysteresis_tracker"):
            if type(scaler.get(name)) is not int or abs(scaler[name]) > _LARGEST:
                raise ValueError(f"{name} cannot be {quoted(scaler.get(name))}")


def _check_alarms(state: dict[str, Any]) -> None:
    for name, value in _items(state.get("streaks"), "streaks"):
        _check_count(value, f"streaks.{named(name)}")
    for name in ("first_length", "value_loss"):
        if name not in state:
            raise ValueError(f"alarms have no {name}")
        if state[name] is not None:
            _check_number(state[name], name, is_finite=True)


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} cannot be {quoted(value)}")
    return list(value.items())


def _check_count(value: Any, what: str) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} cannot be {quoted(value)}")


def _check_number(
    value: Any, what: str, *, is_finite: bool = False, least: float = -math.inf
) -> None:
    """A number of JSON as Python has it: nan and infinities too, unless it is to be finite."""
    is_number = type(value) is float or (type(value) is int and abs(value) <= _LARGEST)
    if not is_number or (is_finite and not (math.isfinite(value) and value >= least)):
        raise ValueError(f"{what} cannot be {quoted(value)}")
