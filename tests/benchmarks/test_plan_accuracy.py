"""The planner's bytes of weights, gradients and optimizer state are those of a real step."""

from dataclasses import replace

import pytest
import torch

from benchmarks.language_step import Job
from benchmarks.plan_accuracy import measured_cluster, ppo_rows, train_rows
from engine.settings.numerics import Numerics
from models.sizes import SIZES
from tests.benchmarks.test_ppo_provider import JOB as ITERATION

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_of_a_step_are_as_planned(dtype):
    job = Job(
        size=SIZES["tiny"],
        numerics=Numerics(dtype=dtype),
        num_sequences=2,
        length=32,
        micro_batch_tokens=64,
    )
    cluster = measured_cluster(CPU, torch.float32)
    rows = {what: (p, m) for what, p, m in train_rows(job, "tiny", cluster, CPU)}
    for what in ("gradients, bytes", "masters and moments, bytes"):
        planned, measured = rows.pop(what)
        assert planned == measured, what
    planned, measured = rows.pop("weights, bytes")
    assert planned == pytest.approx(measured, rel=1e-3)  # the padding of a buffer
    assert all(planned > 0 and measured > 0 for planned, measured in rows.values())


@pytest.mark.slow
def test_phases_of_an_iteration_are_planned_and_measured(monkeypatch):
    monkeypatch.setattr("engine.metrics.plot_curves", lambda run_dir: None)
    iteration = replace(ITERATION, size=SIZES["tiny"], critic_size=SIZES["tiny"])
    rows = ppo_rows(iteration, "tiny", measured_cluster(CPU, torch.float32), CPU)
    assert [what for what, _, _ in rows] == [
        "rollout, seconds",
        "score, seconds",
        "update, seconds",
    ]
    assert all(planned > 0 and measured > 0 for _, planned, measured in rows)
