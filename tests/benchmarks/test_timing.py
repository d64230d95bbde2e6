"""Samples take turns, quantiles are those of the samples, memory is the peak and not the rest."""

import json
import time

import pytest
import torch

from benchmarks.timing import (
    append_record,
    device_name,
    machine,
    peak_bytes,
    records_path,
    time_calls,
    time_limit,
    wall_clock,
)

CPU = torch.device("cpu")


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    time_calls(calls, wall_clock(CPU), num_samples=3)
    assert order == ["a", "b"] * 3


def test_summary_is_the_median_and_the_outer_fifths():
    samples = iter(range(11))  # 0 to 10 ms
    timing = time_calls({"a": lambda: None}, lambda call: float(next(samples)), num_samples=11)["a"]
    assert timing == (5.0, 2.0, 8.0, 11)


def test_one_sample_is_its_own_summary():
    assert time_calls({"a": lambda: None}, lambda call: 3.0, num_samples=1)["a"] == (3, 3, 3, 1)


def test_a_call_that_has_used_its_time_gets_no_more_samples():
    calls = {"slow": lambda: 40.0, "fast": lambda: 1.0}
    timings = time_calls(calls, lambda call: call(), num_samples=5, seconds=0.1)
    assert {name: timing.num_samples for name, timing in timings.items()} == {"slow": 3, "fast": 5}
    assert time_calls(calls, lambda call: call(), seconds=0.0)["slow"].num_samples == 1


def test_time_limit_ends_a_block_and_is_gone_after_it():
    with pytest.raises(TimeoutError, match=r"took more than 0.05 s"), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_wall_clock_measures_milliseconds():
    assert 20 <= wall_clock(CPU)(lambda: time.sleep(0.02)) < 2000


def test_peak_counts_temporaries_once_they_are_freed():
    def call() -> torch.Tensor:
        large = torch.ones(1000, 1000)  # 4 MB
        small = large[0] + 1
        del large
        return small + torch.ones(500, 1000).sum()  # 2 MB, after the 4 MB are gone

    assert 4e6 <= peak_bytes(call, CPU) < 4.1e6


def test_peak_counts_results():
    assert 8e6 <= peak_bytes(lambda: [torch.ones(1000, 1000) for _ in range(2)], CPU) < 8.1e6


def test_records_are_lines_of_a_file_per_device(tmp_path):
    path = records_path(tmp_path / "results", CPU)
    append_record(path, {"median_ms": 1.5})
    append_record(path, {"median_ms": 2.5})
    assert path.name == "cpu.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["median_ms"] for line in lines] == [1.5, 2.5]


def test_file_name_of_a_gpu_is_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert records_path(tmp_path, torch.device("cuda")).name == "nvidia-h100-80gb-hbm3.jsonl"


def test_machine_says_what_a_number_depends_on():
    found = machine(CPU)
    assert found["device"] == device_name(CPU)
    assert found["torch"] == torch.__version__
    assert {"threads", "triton", "commit", "date"} <= found.keys()
    assert "attention" not in found
    assert machine(CPU, torch.bfloat16)["attention"] == "torch SDPA"


def test_a_copied_tree_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("TRIDENT_COMMIT", "abc1234+changes")
    assert machine(CPU)["commit"] == "abc1234+changes"
    monkeypatch.setenv("TRIDENT_COMMIT", "")
    assert machine(CPU)["commit"] != ""


@pytest.mark.gpu
def test_gpu_clock_launches_and_graph():
    from benchmarks.timing import as_cuda_graph, device_clock, num_launches

    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    # 137 GFLOP, which no GPU does within 50 us.
    assert device_clock(device)(lambda: x @ x) > 0.05
    assert num_launches(lambda: (x.add_(1), x.mul_(0.5))) == 2
    assert peak_bytes(lambda: x + 1, device) == x.nbytes
    y = torch.zeros(1, device=device)
    replay = as_cuda_graph(lambda: y.add_(1))
    before = y.item()
    replay()
    assert y.item() == before + 1
    assert as_cuda_graph(lambda: y.item()) is None
