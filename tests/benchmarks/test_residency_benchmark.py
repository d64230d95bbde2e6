"""The benchmark of residency runs on a CPU and finds what the choices differ in."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import residency


def records_of(monkeypatch: pytest.MonkeyPatch, folder: Path, options: str) -> list[dict]:
    options = f"--device cpu --size tiny --batch 2 --response-tokens 3 --num-samples 1 {options}"
    monkeypatch.setattr(sys, "argv", ["residency", *options.split(), "--out", str(folder)])
    residency.main()
    return [json.loads(line) for line in (folder / "cpu.jsonl").read_text().splitlines()]


def test_benchmark_runs_and_records_all_choices(tmp_path, monkeypatch):
    records = records_of(monkeypatch, tmp_path, "")
    names = ["swap", "frozen", "resident", "hidden", "host"]
    assert [record["provider"] for record in records] == names
    swap, frozen, resident, hidden, host = records
    assert swap["link_share"] == swap["swap_bytes"] / swap["swap_s"] / swap["link_bytes_per_s"]
    assert resident["host_bytes"] == 0 < frozen["host_bytes"] < host["host_bytes"]
    for phase in ("rollout", "score"):
        peaks = [record[f"{phase}_peak_bytes"] for record in (host, frozen, resident)]
        assert peaks[0] < peaks[1] < peaks[2]
    assert host["rollout_peak_bytes"] == pytest.approx(swap["swap_bytes"] / 4, rel=0.05)
    assert 0 <= hidden["hidden_fraction"] <= 1


def test_quick_leaves_out_what_pins_the_optimizers_state(tmp_path, monkeypatch):
    records = records_of(monkeypatch, tmp_path, "--quick")
    assert [r["provider"] for r in records] == ["swap", "frozen", "resident", "hidden"]


def test_choices_that_differ_stop_before_what_is_hidden_is_recorded(tmp_path, monkeypatch):
    numbers = iter([torch.zeros(2), torch.ones(2)])
    whole = residency.measure_iterations
    monkeypatch.setattr(residency, "measure_iterations", lambda *a: (whole(*a)[0], next(numbers)))
    with pytest.raises(RuntimeError, match="resident differs"):
        records_of(monkeypatch, tmp_path, "--quick")
    lines = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["provider"] for line in lines] == ["swap", "frozen"]


def test_hidden_is_what_scoring_does_not_take_longer():
    swap, resident = {"swap_s": 2.0}, {"score_s": 5.0}
    assert residency._hidden(swap, {"score_s": 5.5}, resident)["hidden_fraction"] == 0.75
    assert residency._hidden(swap, {"score_s": 4.0}, resident)["hidden_fraction"] == 1.0
    assert residency._hidden(swap, {"score_s": 9.0}, resident)["hidden_fraction"] == 0.0
