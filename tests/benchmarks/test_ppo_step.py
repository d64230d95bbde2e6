"""Providers do one job of known lengths, phase by phase, or nothing is recorded of them."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from benchmarks import ppo_step
from benchmarks.ppo_job import Effort, Job, Measured
from benchmarks.ppo_scene import PHASES, build, random_prompts, run_iteration
from engine.parallel import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from tests.tiny import SIZE

CPU = torch.device("cpu")
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
ONE = Effort(num_samples=1)


@pytest.mark.parametrize("provider", ["trident", "trident, ptx"])
def test_iteration_is_measured_by_its_phases(provider):
    record = ppo_step.measure(JOB, CPU, ONE, provider=provider)
    assert set(record["phase_s"]) == set(PHASES)
    assert record["median_s"] == pytest.approx(sum(record["phase_s"].values()))
    assert record["episodes_per_s"] == pytest.approx(8 / record["median_s"])
    assert record["num_response_tokens"] == 8 * 12
    assert record["num_updates"] == 2
    assert abs(record["first_kl_per_token"]) < 1e-5  # the reference has the policy's weights
    assert record["peak_bytes"] > 1e8
    assert record["job"]["ptx_examples_per_episode"] == int(provider == "trident, ptx")


def test_minibatches_train_and_only_ptx_reads_text():
    for job, has_ptx in ((JOB, True), (JOB.plain(), False)):
        config = ppo_step.config_of(job, 1)
        parallel = start_parallel(ParallelLayout(), seed=0)
        feed = ppo_step.feed_of(job, config, parallel)
        scene = build(config, (SIZE, SIZE), parallel, feed)
        (module,) = scene.learner.policy.network.modules
        before = [parameter.detach().clone() for parameter in module.parameters()]
        iteration = run_iteration(scene, config, random_prompts(SIZE, 8, 8), 0)
        assert ("update/ptx_loss" in iteration.values) == has_ptx
        pairs = zip(before, module.parameters(), strict=True)
        assert any((old != new).any() for old, new in pairs)


def test_time_ends_a_provider_after_one_counted_iteration():
    effort = Effort(num_samples=50, seconds=0.0)
    assert ppo_step.measure(JOB, CPU, effort)["num_samples"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_response_tokens": 95}, "drew 95 response tokens, the job has 96"),
        ({"num_updates": 1}, "took 1 optimizer steps, the job has 2"),
        ({"losses": (0.0, math.nan)}, "not finite"),
    ],
)
def test_other_work_is_not_recorded(monkeypatch, change, message):
    right = Measured(
        seconds=[{"update": 1.0}],
        num_response_tokens=96,
        num_updates=2,
        losses=(0.0, 1.0),
        kl_per_token=0.0,
        peak_bytes=1,
    )
    wrong = dataclasses.replace(right, **change)
    monkeypatch.setattr(ppo_step, "run_trident", lambda *_: wrong)
    with pytest.raises(RuntimeError, match=message):
        ppo_step.measure(JOB, CPU, ONE)


def test_records_are_written_as_they_are_there_and_a_missing_rival_is_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "trl", None)
    options = "--device cpu --size tiny --num-episodes 4 --minibatch-size 2 --prompt-tokens 4"
    options += f" --response-tokens 4 --num-samples 1 --out {tmp_path} --providers trident trl"
    monkeypatch.setattr(sys, "argv", ["ppo_step", *options.split()])
    ppo_step.main()
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert json.loads(line)["provider"] == "trident"
    assert "trl is left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["trl", "trl, mixed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_trl_does_the_same_job(provider, dtype):
    pytest.importorskip("trl.experimental.ppo")
    job = dataclasses.replace(JOB, numerics=Numerics(dtype=dtype), micro_batch_tokens=40)
    record = ppo_step.measure(job, CPU, ONE, provider=provider)
    assert set(record["phase_s"]) == {"rollout", "score", "update"}
    assert all(seconds > 0 for seconds in record["phase_s"].values())
    assert (record["num_response_tokens"], record["num_updates"]) == (96, 2)
    # Two episodes a pass: two passes are one of the two optimizer steps.
    assert record["settings"]["per_device_train_batch_size"] == 2
    assert abs(record["first_kl_per_token"]) < (1e-5 if dtype == "fp32" else 0.05)
