"""A child goes with its parent, and a rank with its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.recipe_runs import (
    ROOT,
    TORCHRUN,
    is_living,
    saved_step,
    sft_command,
    start,
    steps_logged,
    until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

CHILD = """
import os, sys, time
from engine.process.family import die_with
die_with(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""
RANK = """
import os, sys, time
from engine import stop
from engine.process.family import watching_launcher
with stop.noting_signals(), watching_launcher(float(sys.argv[1])):
    print(os.getpid(), flush=True)
    while not stop.is_noted() or sys.argv[2] == "hangs":
        time.sleep(0.05)
open(sys.argv[3], "w").write("asked")
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def start_under(program: str, *arguments: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """Start a parent and the child that it starts; return it and the child's number."""
    parent = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_a_child_that_works_for_its_parent_is_killed_with_it():
    parent, child = start_under(PARENT, CHILD)
    parent.kill()
    until(lambda: not psutil.pid_exists(child) or not is_living(psutil.Process(child)), 10)


def test_a_child_whose_parent_is_gone_already_does_not_begin():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    orphan = subprocess.run([sys.executable, "-c", CHILD, "1"], env=environment, timeout=30)
    assert orphan.returncode == 1


@pytest.mark.parametrize("way", ["stops", "hangs"])
def test_a_rank_whose_launcher_is_killed_is_asked_to_stop_and_ends(way: str, tmp_path: Path):
    asked = tmp_path / "asked"
    parent, rank = start_under(
        LAUNCHER, RANK, "2", way, str(asked), TORCHELASTIC_RUN_ID="x", WORLD_SIZE="1"
    )
    parent.kill()
    until(lambda: not psutil.pid_exists(rank) or not is_living(psutil.Process(rank)), 30)
    assert asked.exists() == (way == "stops")


def test_a_process_that_no_launcher_has_started_may_outlive_its_parent(tmp_path: Path):
    environment = dict.fromkeys(("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"))
    assert not any(name in os.environ for name in environment)
    parent, child = start_under(LAUNCHER, RANK, "0", "stops", str(tmp_path / "asked"))
    parent.kill()
    time.sleep(2.5)
    assert is_living(psutil.Process(child))
    os.kill(child, signal.SIGTERM)
    until(lambda: (tmp_path / "asked").exists(), 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_dead_torchrun_leaves_no_rank_behind(
    num_ranks: int, number: int, tiny: Path, tmp_path: Path
):
    command = sft_command(tiny, tmp_path / "run", "--epochs", 2000, "--layout.tp", num_ranks)
    launcher = [*TORCHRUN, "--standalone", f"--nproc-per-node={num_ranks}"]
    torchrun = start(command, tmp_path, launcher=launcher)
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        ranks = torchrun.ranks()
        assert len(ranks) == num_ranks
        torchrun.process.send_signal(number)
        until(lambda: not any(map(is_living, ranks)), 110)
        if num_ranks == 1:  # two have lost the store by which they would save
            assert "stopped by a signal at step" in torchrun.said()
        assert saved_step(tmp_path / "run") >= 1
        assert "Traceback" not in torchrun.said()
    finally:
        torchrun.end()


@pytest.mark.slow
def test_a_torchrun_that_dies_while_its_ranks_start_leaves_none_behind(tiny: Path, tmp_path: Path):
    command = sft_command(tiny, tmp_path / "run", "--layout.tp", 2)
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
    torchrun = start(command, tmp_path, launcher=launcher)
    try:
        until(lambda: len(torchrun.ranks()) == 2)
        ranks = torchrun.ranks()
        time.sleep(1.0)
        torchrun.process.kill()
        until(lambda: not any(map(is_living, ranks)), 110)
        assert torchrun.said().count("launcher of this node's ranks is gone") <= 1
    finally:
        torchrun.end()
