"""The tuner of the row kernels."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tune_kernels
from kernels.launch import LaunchConfig, config_for


def test_every_candidate_is_checked_timed_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune_kernels", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    tune_kernels.main()
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    cases = {(record["kernel"], record["what"]) for record in records}
    assert {kernel for kernel, _ in cases} == set(tune_kernels.CANDIDATES)
    assert len(records) == len(cases) * len(tune_kernels.CANDIDATES_ON_CPU)
    assert {record["status"] for record in records} == {"right"}
    assert all(record["milliseconds"] > 0 for record in records)
    assert "No GPU" in capsys.readouterr().out


def test_a_wrong_candidate_and_one_that_fails_are_not_timed() -> None:
    def fails() -> float:
        raise RuntimeError("no kernel image")

    def never() -> None:
        raise AssertionError("timed")

    for error, status in ((lambda: 1.0, "wrong"), (fails, "RuntimeError: no kernel image")):
        case = tune_kernels.Case("row_state", "", never, 1, error, tolerance=0.5)
        record = tune_kernels._measure(case, LaunchConfig(64, 1), torch.device("cpu"))
        assert record["status"] == status
        assert record.get("milliseconds") is None


def test_a_forced_configuration_comes_first_and_goes_again() -> None:
    cpu = torch.device("cpu")
    before = config_for("row_state", 999, cpu)
    with tune_kernels._configured("row_state", LaunchConfig(32, 2, 3), cpu):
        assert config_for("row_state", 999, cpu) == LaunchConfig(32, 2, 3)
        with tune_kernels._configured("row_state", LaunchConfig(16, 1), cpu):
            assert config_for("row_state", 999, cpu) == LaunchConfig(16, 1)
        assert config_for("row_state", 999, cpu) == LaunchConfig(32, 2, 3)
    assert config_for("row_state", 999, cpu) == before
