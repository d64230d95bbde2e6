"""The benchmark of residency runs on a CPU and finds what the choices differ in."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import residency


def test_benchmark_runs_and_records_both_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = "--device cpu --size tiny --batch 2 --response-tokens 3 --num-samples 1 --out"
    monkeypatch.setattr(sys, "argv", ["residency", *options.split(), str(tmp_path)])
    residency.main()
    lines = (tmp_path / "cpu.jsonl").read_text().splitlines()
    resident, host = (json.loads(line) for line in lines)
    assert (resident["provider"], host["provider"]) == ("resident", "host")
    assert resident["host_bytes"] == 0 < host["host_bytes"]
    for phase in ("rollout", "score", "update"):
        assert host[f"{phase}_peak_bytes"] < resident[f"{phase}_peak_bytes"]
    assert host["rollout_peak_bytes"] == pytest.approx(host["swap_bytes"] / 4, rel=0.05)
    assert 0 <= host["hidden_fraction"] <= 1
