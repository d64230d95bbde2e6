"""A step that hangs or dies costs itself alone, and what is known is on disk at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import spend as spend_module
from benchmarks.gpu.spend import Outcome, Spending, Step, grouped
from benchmarks.gpu.summary import read_outcomes

ROOT = Path(__file__).parents[3]
FINE = "print('fine')"
HANGS = "import time\nprint('about to hang', flush=True)\ntime.sleep(600)"
DIES = "import os\nprint('about to die', flush=True)\nos.kill(os.getpid(), 11)"
FAILS = "raise ValueError('not right')"
# Its child keeps the output open and would outlive it.
LEAVES_A_CHILD = (
    "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)"
)


def step(name: str, program: str, *, limit: float = 60, is_timed: bool = True) -> Step:
    return Step(name=name, command=("-c", program), limit=limit, is_timed=is_timed)


def spend(folder: Path, *steps: Step, budget: float = 60, side_by_side: int = 2) -> list[Outcome]:
    quiet = {"budget": budget, "side_by_side": side_by_side, "say": lambda line: None}
    with Spending(folder, **quiet) as spending:
        return spending.run(steps)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_step_that_hangs_dies_or_fails_costs_itself_alone(tmp_path):
    start = time.monotonic()
    outcomes = spend(
        tmp_path,
        step("hangs", HANGS, limit=2),
        step("dies", DIES),
        step("fails", FAILS),
        step("fine", FINE),
    )
    assert time.monotonic() - start < 20
    assert [o.status for o in outcomes] == ["hung", "died", "failed", "done"]
    assert outcomes[0].tail == ["about to hang"]
    assert outcomes[1].returncode == -signal.SIGSEGV
    assert outcomes[2].tail[-1] == "ValueError: not right"
    assert list(read_outcomes(tmp_path).values()) == outcomes
    log = (tmp_path / "log.txt").read_text()
    assert "[dies] about to die\n" in log
    assert "[fine] fine\n" in log


def test_what_a_step_started_ends_with_it(tmp_path):
    outcomes = spend(tmp_path, step("parent", LEAVES_A_CHILD))
    assert outcomes[0].status == "done"
    pid = int((tmp_path / "log.txt").read_text().split()[-1])
    wait_until(lambda: not is_running(pid))


def test_steps_that_time_nothing_run_side_by_side(tmp_path):
    # Each waits for the file of the other: one after the other, both would hang.
    program = (
        "import pathlib, time\n"
        "pathlib.Path({mine!r}).touch()\n"
        "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes = spend(
        tmp_path,
        step("a", program.format(mine=a, other=b), limit=20, is_timed=False),
        step("b", program.format(mine=b, other=a), limit=20, is_timed=False),
    )
    assert [o.status for o in outcomes] == ["done", "done"]


def test_a_step_that_times_has_the_device_to_itself():
    steps = [
        step("a", FINE, is_timed=False),
        step("b", FINE, is_timed=False),
        step("c", FINE),
        step("d", FINE),
        step("e", FINE, is_timed=False),
    ]
    names = [[s.name for s in group] for group in grouped(steps)]
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]


def test_no_step_is_begun_without_the_time_to_import_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(spend_module, "LEAST_SECONDS", 1.0)
    outcomes = spend(tmp_path, step("long", HANGS, limit=60), step("next", FINE), budget=2)
    assert [o.status for o in outcomes] == ["cut short", "not reached"]


def test_a_step_that_prints_without_end_fills_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(spend_module, "_LOG_CHARACTERS", 10_000)
    program = "for _ in range(20): print('x' * 5000)\nraise ValueError('at the end')"
    outcomes = spend(tmp_path, step("prints", program))
    assert (tmp_path / "log.txt").stat().st_size < 12_000
    assert outcomes[0].tail[-1] == "ValueError: at the end"
    assert max(len(line) for line in outcomes[0].tail) <= 2000


def test_a_signal_while_a_step_starts_ends_that_step(tmp_path, monkeypatch):
    start, quiet = subprocess.Popen, {"budget": 60, "side_by_side": 1, "say": lambda line: None}
    with Spending(tmp_path, **quiet) as spending:

        def start_and_stop(*arguments, **named):
            process = start(*arguments, **named)
            spending._stop()  # as a signal's handler does, before the step is known as running
            return process

        monkeypatch.setattr(spend_module.subprocess, "Popen", start_and_stop)
        begun = time.monotonic()
        outcomes = spending.run([step("hangs", HANGS, limit=30)])
    assert time.monotonic() - begun < 10
    assert outcomes[0].status == "died"


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path):
    quiet = {"budget": 60, "side_by_side": 1, "say": lambda line: None}
    with Spending(tmp_path, **quiet) as spending:
        spending._log.close()
        spending._log = open("/dev/full", "w")  # noqa: SIM115 - closed by Spending
        outcomes = spending.run([step("prints", "print('x' * 500_000)", limit=20)])
        spending._log = open("/dev/null", "w")  # noqa: SIM115
    assert outcomes[0].status == "done"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_killed_has_kept_what_it_had_and_leaves_no_process(tmp_path, how):
    program = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu.spend import Spending, Step\n"
        "def leave(signum, frame): raise SystemExit(3)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "signal.signal(signal.SIGHUP, leave)\n"
        f"steps = [Step(name='first', command=('-c', {FINE!r}), limit=60),\n"
        "    Step(name='second', limit=60, command=('-c', 'import os, time\\n'\n"
        "        'print(os.getpid(), flush=True)\\n' 'time.sleep(600)'))]\n"
        f"with Spending(Path({str(tmp_path)!r}), budget=60, side_by_side=1) as spending:\n"
        "    spending.run(steps)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", program], env=environment)
    log = tmp_path / "log.txt"
    wait_until(lambda: log.exists() and "[second]" in log.read_text())
    pid = int(log.read_text().split()[-1])
    driver.send_signal(how)
    driver.wait(timeout=20)
    wait_until(lambda: not is_running(pid))
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [(json.loads(x)["step"], json.loads(x)["status"]) for x in lines][0] == ("first", "done")
