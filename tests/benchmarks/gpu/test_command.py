"""`python -m benchmarks.gpu`: all of its steps run on a CPU and end with the table."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kernel_checks import ODD
from benchmarks.gpu.steps import all_steps, files_with_gpu_tests
from benchmarks.gpu.targets import TARGETS
from benchmarks.kernels import OPERATIONS
from benchmarks.records import read_records

ROOT = Path(__file__).parents[3]


def run(*arguments: str, timeout: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str
) -> str:
    """The line that the command ends with on stderr, with status 2."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


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
    assert "without the record" not in table
    assert "has not run" not in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    error = error_of(monkeypatch, capsys, "--device", "cuda", "--out", str(tmp_path))
    assert error.startswith("error: no GPU here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "nothing", "--out", "OUT"), "--only nothing names none of: check logprobs"),
        (("--budget", "0", "--out", "OUT/none"), "has none"),
        (("--out", "/proc/none"), "--out /proc/none cannot be written"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, options, words):
    arguments = [option.replace("OUT", str(tmp_path)) for option in options]
    error = error_of(monkeypatch, capsys, "--device", "cpu", "--quick", *arguments)
    assert error.startswith("error: ")
    assert words in error


def test_the_table_of_a_killed_run_on_a_cpu_judges_no_speed(tmp_path):
    size = {"sequences": 512, "length": 1024, "mode": "forward", "launches": 9, "wall_ms": 9.0}
    record = {"benchmark": "kernels", "operation": "gae", "provider": "trident", "median_ms": 9.0}
    record |= {"status": "timed", "is_bound": False, "date": "2026", "commit": "x"} | size
    (tmp_path / "cpu.jsonl").write_text('{"benchm\n' + json.dumps(record) + '\n{"bench')
    (tmp_path / "steps.jsonl").write_text('{"step": "a", "stat\n')
    done = run("--budget", "0", "--out", str(tmp_path), timeout=120)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.txt").read_text()
    assert "9 launches" in table
    assert "slower" not in table


def test_every_kernel_has_an_odd_size_and_every_target_a_step(tmp_path):
    assert ODD.keys() == OPERATIONS.keys()
    for name, operation in OPERATIONS.items():
        assert ODD[name].keys() == operation.sizes["cuda"][0].keys()
    steps = [step.name for step in all_steps("cuda", tmp_path, is_quick=False)]
    assert len(steps) == len(set(steps))
    for target in TARGETS:
        assert set(target.steps) <= set(steps), target.name
        assert set(target.operations) <= OPERATIONS.keys()


def test_a_file_without_the_marker_is_no_step():
    files = files_with_gpu_tests()
    assert "tests/models/test_attention.py" in files
    assert "tests/test_layout.py" not in files
