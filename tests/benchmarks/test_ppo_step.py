"""An iteration of the real PPO stage is timed by its phases, on lengths that are known."""

import sys
import types

import pytest
import torch

from benchmarks.ppo_step import PHASES, Job, measure, rival
from engine.settings.numerics import Numerics
from tests.tiny import SIZE

JOB = Job(
    size=SIZE,
    critic_size=SIZE,
    numerics=Numerics(),
    num_episodes=8,
    minibatch_size=4,
    prompt_tokens=8,
    response_tokens=12,
    pretraining_tokens=32,
    ptx_examples_per_episode=1,
    micro_batch_tokens=256,
)


def test_iteration_is_measured_by_its_phases(monkeypatch):
    monkeypatch.setattr("engine.metrics.plot_curves", lambda run_dir: None)
    record = measure(JOB, torch.device("cpu"), num_samples=1)
    assert set(record["phase_s"]) == set(PHASES)
    assert record["median_s"] == pytest.approx(sum(record["phase_s"].values()))
    assert record["episodes_per_s"] == pytest.approx(8 / record["median_s"])
    assert 6 < record["response_tokens"] <= 12
    assert record["peak_bytes"] > 1e8


def test_rival_that_is_left_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert rival() == "TRL is not installed: left out"
    trl = types.SimpleNamespace(__version__="1.2")
    monkeypatch.setitem(sys.modules, "trl", trl)
    assert rival() == "TRL 1.2 has no PPO trainer: left out"
    trl.PPOTrainer = object
    assert "does not run it" in rival()
