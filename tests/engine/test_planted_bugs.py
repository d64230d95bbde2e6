"""Bugs of PPO, each planted in a run, and the alarm that finds it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import ppo
from engine.network import Network
from engine.rollout import Rollout
from engine.settings.alarms import AlarmConfig
from tests.tiny import ADAM, ppo_config, train

# The networks are random: few of their responses end, and policy and reference are far apart.
ALARMS = AlarmConfig(patience=1, min_eos_rate=0.0, max_clip_fraction=1.0, max_kl=1e3)


def alarms_of(files: Path, run: Path, **changes: Any) -> set[str]:
    """Run two iterations and return the names of the alarms that rang."""
    train(ppo_config(files, run, **{"alarms": ALARMS, "num_shown": 0, **changes}))
    path = run / "alarms.jsonl"
    return (
        {json.loads(line)["name"] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )


def wrap(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Put change(original, ...) in the place of a function that engine/ppo.py calls."""
    original = getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *a, **named: change(original, *a, **named))


def test_sound_run_is_silent(tiny: Path, tmp_path: Path):
    assert alarms_of(tiny, tmp_path) == set()


def test_temperature_that_scoring_forgets(tiny: Path, tmp_path: Path, monkeypatch):
    sampling = dataclasses.replace(ppo_config(tiny, tmp_path).sampling, temperature=0.7)
    assert alarms_of(tiny, tmp_path / "sound", sampling=sampling) == set()
    wrap(
        monkeypatch,
        "score_rollout",
        lambda score, rollout, **named: score(rollout, **{**named, "temperature": 1.0}),
    )
    assert "logprob_mismatch" in alarms_of(tiny, tmp_path / "bug", sampling=sampling)


def test_dropout_left_on(tiny: Path, tmp_path: Path, monkeypatch):
    wrap(
        monkeypatch,
        "build_network",
        lambda build, *a, **named: build(*a, **{**named, "dropout": 0.2}),
    )
    assert "first_ratio" in alarms_of(tiny, tmp_path)


def test_old_logprobs_shifted_by_one(tiny: Path, tmp_path: Path, monkeypatch):
    def shifted(score: Callable[..., Rollout], rollout: Rollout, **named: Any) -> None:
        score(rollout, **named)
        rollout.logprobs = rollout.logprobs.roll(1)

    wrap(monkeypatch, "score_rollout", shifted)
    assert {"first_ratio", "logprob_mismatch"} <= alarms_of(tiny, tmp_path)


def test_responses_of_another_network(tiny: Path, tmp_path: Path, monkeypatch):
    loaded: dict[Path, Network] = {}

    def keep(load: Callable[..., Network], kind: str, path: Path, *a: Any) -> Network:
        loaded[path] = load(kind, path, *a)
        return loaded[path]

    wrap(monkeypatch, "_load", keep)
    wrap(
        monkeypatch,
        "generate_rollout",
        lambda generate, policy, *a, **named: generate(loaded[tiny / "reference"], *a, **named),
    )
    assert "negative_kl" in alarms_of(tiny, tmp_path)


def test_end_tokens_that_sampling_does_not_know(tiny: Path, tmp_path: Path, monkeypatch):
    alarms = dataclasses.replace(ALARMS, min_eos_rate=0.3)
    sampling = dataclasses.replace(
        ppo_config(tiny, tmp_path).sampling, stop_token_ids=tuple(range(1, 30))
    )
    settings = {"alarms": alarms, "sampling": sampling}
    assert alarms_of(tiny, tmp_path / "sound", **settings) == set()
    wrap(
        monkeypatch,
        "generate_rollout",
        lambda generate, policy, prompts, sampling, **named: generate(
            policy, prompts, dataclasses.replace(sampling, stop_token_ids=()), **named
        ),
    )
    assert alarms_of(tiny, tmp_path / "bug", **settings) == {"eos_rate"}


def test_whitening_that_moves_the_prompts(tiny: Path, tmp_path: Path, monkeypatch):
    def whitened(estimate: Callable[..., Any], rollout: Rollout, **named: Any) -> Any:
        result = estimate(rollout, **named)
        rollout.advantages = (rollout.advantages - result[1].mean) * result[1].rstd
        return result

    wrap(monkeypatch, "estimate_advantages", whitened)
    assert "pad_leak" in alarms_of(tiny, tmp_path)


def test_learning_rate_that_throws_the_critic_off(tiny: Path, tmp_path: Path):
    wild = dataclasses.replace(ADAM, lr=3.0, schedule="constant")
    found = alarms_of(tiny, tmp_path, critic_adam=wild, minibatch_size=8, iterations=3)
    assert "value_loss" in found
