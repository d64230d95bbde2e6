"""Providers do one job from the same weights, phase by phase, or have no record."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import ppo_trident
from benchmarks.ppo_job import Effort, Job, Measured, job_as_json, job_from, peak_bytes
from benchmarks.ppo_provider import measure
from benchmarks.ppo_scene import PHASES, build, random_prompts, run_iteration
from benchmarks.ppo_weights import write_weights
from benchmarks.rivals import ROOT, missing_rivals, rivals_environment
from engine.ranks.start import start_parallel
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
MIXED = dataclasses.replace(JOB, workload="mixed", response_tokens=32, num_episodes=64)
ONE = Effort(num_samples=1)


@pytest.mark.parametrize("provider", ["trident", "trident, ptx"])
def test_iteration_is_measured_by_its_phases(provider):
    record = measure(JOB, CPU, ONE, provider=provider)
    assert set(record["phase_s"]) == set(PHASES)
    assert record["median_s"] == pytest.approx(sum(record["phase_s"].values()))
    assert record["episodes_per_s"] == pytest.approx(8 / record["median_s"])
    assert record["num_response_tokens"] == 8 * 12
    assert record["response_lengths"] == {"mean": 12, "std": 0, "min": 12, "max": 12, "count": 16}
    assert record["num_updates"] == 2
    assert abs(record["first_kl_per_token"]) < 1e-5  # the reference has the policy's weights
    assert 1e8 < record["start_bytes"] <= record["peak_bytes"]
    assert record["job"]["ptx_examples_per_episode"] == int(provider == "trident, ptx")


def test_minibatches_train_and_only_ptx_reads_text():
    for job, has_ptx in ((JOB, True), (JOB.plain(), False)):
        config = ppo_trident.config_of(job, 1)
        parallel = start_parallel(ParallelLayout(), seed=0)
        feed = ppo_trident.feed_of(job, config, parallel)
        scene = build(config, (SIZE, SIZE), parallel, feed)
        (module,) = scene.learner.policy.network.modules
        before = [parameter.detach().clone() for parameter in module.parameters()]
        iteration = run_iteration(scene, config, random_prompts(SIZE, 8, 8), 0)
        assert ("update/ptx_loss" in iteration.values) == has_ptx
        assert iteration.num_updates == 2
        pairs = zip(before, module.parameters(), strict=True)
        assert any((old != new).any() for old, new in pairs)


def test_an_end_that_the_model_draws_ends_its_responses(tmp_path):
    write_weights(MIXED, tmp_path, CPU)
    record = measure(MIXED, CPU, Effort(num_samples=2), weights=tmp_path)
    lengths = record["response_lengths"]
    # The fourth token and all up to the 32nd are the end with a chance of 1/12 each.
    expected = 3 + 12 * (1 - (11 / 12) ** 29)
    assert (lengths["min"], lengths["max"], lengths["count"]) == (4, 32, 192)
    assert abs(lengths["mean"] - expected) < 4 * lengths["std"] / 192**0.5


def test_time_ends_a_provider_after_one_counted_iteration():
    iteration = {"rollout": 1.0, "update": 2.0}
    assert Effort(num_samples=50, seconds=0.0)([iteration])
    assert not Effort(num_samples=50, seconds=0.0)([iteration] * 2)
    assert Effort(num_samples=50, seconds=6.0)([iteration] * 2)
    assert not Effort(num_samples=1)([iteration] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [[12] * 8, [12] * 7 + [11]]}, "responses of 11 to 12 tokens, the job has 12"),
        ({"lengths": [[12] * 8, [12] * 7]}, "had 7 episodes, the job has 8"),
        ({"num_updates": 1}, "took 1 optimizer steps, the job has 2"),
        ({"losses": (0.0, math.nan)}, "not finite"),
    ],
)
def test_other_work_is_not_recorded(monkeypatch, change, message):
    right = Measured(
        seconds=[{"update": 1.0}],
        lengths=[[12] * 8] * 2,
        num_updates=2,
        losses=(0.0, 1.0),
        kl_per_token=0.0,
        before={},
        start_bytes=1,
        peak_bytes=1,
    )
    wrong = dataclasses.replace(right, **change)
    monkeypatch.setattr(ppo_trident, "run_trident", lambda *_: wrong)
    with pytest.raises(RuntimeError, match=message):
        measure(JOB, CPU, ONE)


def test_a_job_is_the_same_after_its_way_to_a_process():
    assert job_from(json.loads(json.dumps(job_as_json(MIXED)))) == MIXED


def test_a_process_counts_its_own_memory_and_not_its_parents():
    program = "import torch; from benchmarks.ppo_job import peak_bytes as peak\n"
    program += "print(peak(torch.device('cpu')))"
    ballast = bytearray(2**30 + 2**28)  # whatever the process has freed and kept
    ballast[:: 2**12] = b"\1" * len(ballast[:: 2**12])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert peak_bytes(CPU) > 2**30 > int(done.stdout)


def test_a_provider_loads_its_own_libraries_alone():
    program = "import sys, benchmarks.ppo_provider, benchmarks.trl_ppo\n"
    program += "print({'megatron', 'transformers', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["trl", "trl, mixed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_trl_does_the_same_job(tmp_path, provider, dtype):
    if missing := missing_rivals("trl", "accelerate", "datasets"):
        pytest.skip(missing)
    job = dataclasses.replace(JOB, numerics=Numerics(dtype=dtype), micro_batch_tokens=40)
    write_weights(job, tmp_path, CPU)
    command = [sys.executable, "-m", "benchmarks.ppo_provider", provider, "--device", "cpu"]
    command += ["--job", json.dumps(job_as_json(job)), "--weights", str(tmp_path)]
    done = subprocess.run(
        command,
        input="go\ngo\nstop\n",
        env=rivals_environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    assert set(record["phase_s"]) == {"rollout", "score", "update"}
    assert all(seconds > 0 for seconds in record["phase_s"].values())
    assert (record["num_response_tokens"], record["num_updates"]) == (96, 2)
    # Two episodes a pass: two passes are one of the two optimizer steps.
    assert record["settings"]["per_device_train_batch_size"] == 2
    exactness = 1e-5 if dtype == "fp32" else 0.05
    assert abs(record["first_kl_per_token"]) < exactness
    ours = measure(job, CPU, ONE, weights=tmp_path)
    for name, value in ours["before_training"].items():
        assert record["before_training"][name] == pytest.approx(value, abs=exactness), name
