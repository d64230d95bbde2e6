"""A decoding step is timed alone, against the time to read weights and contexts once."""

import json
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import decoding, generation
from benchmarks.decoding import NUM_SHORT, Decode, agreement, answers, counting_captures, measure
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.tiny import SIZE, random_network

CPU = torch.device("cpu")
JOB = Decode(size=SIZE, batch=3, context=40, num_steps=16)


def test_contexts_are_of_that_length_in_the_middle_of_what_is_timed():
    assert JOB.prompt_tokens == 40 - 17 - 8
    # Contexts of the steps timed: the prompt and 17 to 32 answer tokens, 24.5 on average.
    num_read = SIZE.num_parameters + 3 * (15 + 24.5) * 2 * 4 * 32
    assert JOB.bound_ms(2, bandwidth=1e6) == pytest.approx(2 * num_read / 1e3)


def test_a_step_is_the_difference_of_two_runs(monkeypatch):
    monkeypatch.setattr(decoding, "wall_clock", lambda device: lambda call: call())
    slower = iter(range(100))

    def run(num_tokens: int) -> float:
        return 100 + (5 + next(slower) // 2) * num_tokens  # ms: what both have, and 5, 6, 7 a token

    (record,) = measure({"one": run}, JOB, 2, 1e9, CPU, num_samples=3)
    assert record["step_ms"] == pytest.approx(6.0)
    assert record["tokens_per_s"] == pytest.approx(3 / 6e-3)
    assert record["bandwidth_share"] == pytest.approx(record["bound_ms"] / 6)


def test_the_longer_run_has_only_steps_of_the_whole_batch_more():
    network = random_network("language", start_parallel(ParallelLayout(), seed=0))
    config = JOB.sampling(cuda_graphs=True)
    (short, first), (long, second) = (
        answers(network, JOB, config, n) for n in (NUM_SHORT, JOB.num_long)
    )
    assert (short == long[:, :NUM_SHORT]).all()
    assert second.num_steps - first.num_steps == JOB.num_steps
    assert second.num_slot_steps - first.num_slot_steps == JOB.num_steps * JOB.batch


def test_answers_agree_up_to_their_first_difference(monkeypatch):
    network = random_network("language", start_parallel(ParallelLayout(), seed=0))
    assert agreement(network, JOB) == 1.0
    found = iter([np.array([[1, 2, 3, 4]]), np.array([[1, 2, 9, 4]])])
    monkeypatch.setattr(decoding, "answers", lambda *_: (next(found), None))
    assert agreement(network, JOB) == 0.5


def test_captures_are_counted_with_their_time():
    class Graph:
        def __init__(self, work: str, beside: None) -> None:
            time.sleep(0.02)

    with counting_captures(Graph) as captures:
        for _ in range(2):
            Graph("work", None)
    Graph("work", None)
    assert captures.count == 2
    assert 0.04 <= captures.seconds < 1.0


@pytest.mark.slow
def test_program_records_each_workload(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    options = "--device cpu --batch 2 --num-samples 1 --workload decode fixed --context 96 --out"
    monkeypatch.setattr(sys, "argv", ["generation", *options.split(), str(tmp_path)])
    generation.main()
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [(record["workload"], record["provider"]) for record in records] == [
        ("decode", "trident"),
        ("decode", "trident, eager"),
        ("decode", "huggingface"),
        ("fixed", "trident"),
        ("fixed", "huggingface"),
    ]
    assert records[0]["greedy_same_as_eager"] == records[0]["fp32_greedy_same_as_eager"] == 1.0


@pytest.mark.slow
def test_rivals_can_be_left_out(tmp_path, monkeypatch):
    options = "--device cpu --batch 2 --num-samples 1 --workload fixed --providers trident --out"
    monkeypatch.setattr(sys, "argv", ["generation", *options.split(), str(tmp_path)])
    generation.main()
    (line,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert json.loads(line)["provider"] == "trident"


@pytest.mark.gpu
def test_graphs_decode_with_few_waits_of_the_host():
    from benchmarks.timing import num_host_syncs

    x = torch.ones(3, device="cuda")
    assert num_host_syncs(lambda: x + 1) == 0
    assert num_host_syncs(lambda: (x.sum().item(), x.max().item())) == 2
    network = random_network("language", start_parallel(ParallelLayout(), seed=0))
    records = decoding.measure_trident(network, JOB, 1e12, num_samples=1)
    assert records[0]["first_call_captures"] >= 1
    assert records[0]["host_syncs_per_step"] <= 0.5
