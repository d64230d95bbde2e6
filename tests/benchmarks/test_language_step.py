"""Both providers train on the same tokens to the same loss, or nothing is timed."""

import dataclasses
import sys

import pytest
import torch

from benchmarks import language_step
from benchmarks.language_step import PROVIDERS, Effort, Job, measure, peak_flops
from benchmarks.timing import copy_bandwidth, tensor_bytes
from engine.settings.numerics import Numerics
from tests.tiny import SIZE

CPU = torch.device("cpu")
JOB = Job(size=SIZE, numerics=Numerics(), num_sequences=3, length=16, micro_batch_tokens=32)
EFFORT = Effort(num_samples=2, peak_flops=1e9)


def test_flops_are_those_of_matrices_attention_and_head():
    # 4 layers of 24 h^2 + 4 h (s + 1) / 2 over 48 tokens, a head of 2 h V over 45; three passes.
    layers = 4 * (24 * 32**2 + 4 * 32 * 8.5) * 48
    assert JOB.model_flops == 3 * (layers + 2 * 32 * 100 * 45)


@pytest.mark.parametrize("takes_turns", [True, False])
def test_every_provider_is_measured(monkeypatch, takes_turns):
    pytest.importorskip("transformers")
    if not takes_turns:
        monkeypatch.setattr(language_step, "MOST_PARAMETERS_IN_TURNS", 0)
    ours, theirs = measure(JOB, CPU, PROVIDERS, EFFORT)
    assert (ours["provider"], theirs["provider"]) == PROVIDERS
    for record in (ours, theirs):
        assert record["took_turns"] == takes_turns
        assert record["mfu"] == record["model_flops_per_s"] / 1e9
        assert record["tokens_per_s"] == pytest.approx(48 / record["median_s"])
        assert record["peak_bytes"] > record["state_bytes"] > 0
    # fp32 weights, gradients and two moments, against weights and two moments.
    assert ours["state_bytes"] > theirs["state_bytes"] > 12 * SIZE.num_parameters


def test_the_first_record_is_there_before_the_next_provider_is_built(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(language_step, "MOST_PARAMETERS_IN_TURNS", 0)
    monkeypatch.setattr(language_step, "plain_torch", None)  # calling it fails
    records = measure(JOB, CPU, PROVIDERS, EFFORT)
    assert next(records)["provider"] == "trident"
    with pytest.raises(TypeError):
        next(records)


def test_ours_alone_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    effort = dataclasses.replace(EFFORT, with_profile=True)
    ours, profile = measure(JOB, CPU, ["trident"], effort)
    assert ours["provider"] == profile["provider"] == "trident"
    assert profile["kinds_ms"]["gemm"] > 0
    assert "aten::mm" in profile["text"]


@pytest.mark.parametrize("takes_turns", [True, False])
def test_losses_that_differ_are_not_compared(monkeypatch, takes_turns):
    pytest.importorskip("transformers")
    if not takes_turns:
        monkeypatch.setattr(language_step, "MOST_PARAMETERS_IN_TURNS", 0)
    loss = language_step.NegativeLogLikelihood
    monkeypatch.setattr(language_step, "NegativeLogLikelihood", lambda targets: loss(targets + 1))
    with pytest.raises(RuntimeError, match="first losses differ"):
        next(measure(JOB, CPU, PROVIDERS, EFFORT))


def test_peak_of_a_cpu_is_measured():
    flops, source = peak_flops(CPU, torch.float32)
    assert source == "matrix product"
    assert 1e8 < flops < 1e14
    assert 1e8 < copy_bandwidth(CPU) < 1e13


def test_peak_of_a_known_gpu_is_its_datasheet(monkeypatch):
    monkeypatch.setattr(language_step, "device_name", lambda device: "NVIDIA GB200 NVL72")
    monkeypatch.setattr(language_step, "matmul_flops", lambda device, dtype: 1.0)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == (2500e12, "datasheet")
    assert peak_flops(torch.device("cuda"), torch.float32) == (1.0, "matrix product")


def test_shared_memory_counts_once():
    whole = torch.zeros(100)
    assert tensor_bytes([whole, whole[:50], torch.zeros(25)]) == 500


@pytest.mark.gpu
def test_step_on_a_gpu():
    device = torch.device("cuda")
    job = dataclasses.replace(JOB, numerics=Numerics(dtype="bf16"))
    effort = dataclasses.replace(EFFORT, with_profile=True)
    ours, profile = measure(job, device, ["trident"], effort)
    assert ours["median_s"] > 0
    assert 0 <= profile["idle_ms"] < profile["wall_ms"]
    assert profile["kinds_ms"]["gemm"] > 0
