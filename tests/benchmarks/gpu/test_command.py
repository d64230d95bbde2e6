"""`python -m benchmarks.gpu`: all of its steps run on a CPU and end with the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.kernel_checks import ODD
from benchmarks.gpu.steps import all_steps, files_with_gpu_tests
from benchmarks.gpu.targets import TARGETS
from benchmarks.kernels import OPERATIONS
from benchmarks.records import read_records

ROOT = Path(__file__).parents[3]


def run(*arguments: str, timeout: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_all_steps_run_on_a_cpu_and_end_with_the_table(tmp_path):
    done = run("--device", "cpu", "--quick", "--budget", "900", "--out", str(tmp_path), timeout=950)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    broken = [(step["step"], step["status"], step["tail"]) for step in steps]
    assert not [step for step in broken if step[1] != "done"]
    checks = [r for r in read_records(tmp_path / "cpu.jsonl") if r["benchmark"] == "kernel_check"]
    verdicts = {r["operation"] for r in checks if r["verdict"] == "right"}
    assert verdicts == set(OPERATIONS)
    table = (tmp_path / "table.txt").read_text()
    assert "targets" in table
    assert "not measured" not in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--device", "cuda", "--out", str(tmp_path), timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no GPU here")


def test_every_kernel_has_an_odd_size_and_every_target_a_step(tmp_path):
    assert ODD.keys() == OPERATIONS.keys()
    for name, operation in OPERATIONS.items():
        assert ODD[name].keys() == operation.sizes["cuda"][0].keys()
    steps = [step.name for step in all_steps("cuda", tmp_path, is_quick=False)]
    assert len(steps) == len(set(steps))
    for target in TARGETS:
        assert [name for name in steps if name.startswith(target.steps)], target.name
        assert set(target.operations) <= OPERATIONS.keys()


def test_a_file_without_the_marker_is_no_step():
    files = files_with_gpu_tests()
    assert "tests/models/test_attention.py" in files
    assert "tests/test_layout.py" not in files
