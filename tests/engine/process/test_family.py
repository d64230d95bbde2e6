"""A child goes with its parent, and a rank with its launcher."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from engine import stop
from engine.process import family
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


@pytest.mark.parametrize(
    ("world_size", "has_store_of_launcher", "seconds"),
    [
        ("1", True, 60.0),
        ("2", False, 60.0),  # they met at a store of their own, which is there
        ("2", True, 20.0),
    ],
)
def test_ranks_that_can_save_nothing_together_wait_no_longer_than_to_say_so(
    world_size: str, has_store_of_launcher: bool, seconds: float, monkeypatch
):
    limits: list[float] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(has_store_of_launcher))
    monkeypatch.setattr(family, "_watch", lambda parent, is_over, last: limits.append(last))
    with family.watching_launcher(60.0):
        until(lambda: limits, 10)
    assert limits == [seconds]


def test_a_rank_that_leaves_in_time_is_not_ended(monkeypatch, capsys):
    is_over = threading.Event()
    monkeypatch.setattr(family.stop, "ask", is_over.set)  # and it does
    monkeypatch.setattr(family.os, "_exit", pytest.fail)
    family._watch(os.getppid() + 1, is_over, 60.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_first_rank_of_a_node_says_that_its_launcher_is_gone(
    local_rank: str, monkeypatch, capsys
):
    ended: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(family.stop, "ask", lambda: None)
    monkeypatch.setattr(family.os, "_exit", ended.append)
    family._watch(os.getppid() + 1, threading.Event(), 0.01)
    assert ended == [stop.EXIT_STATUS]
    said = capsys.readouterr().err
    assert ("launcher of this node's ranks is gone, and 0.01 s later" in said) == (
        local_rank == "0"
    )


@pytest.mark.parametrize(
    ("parent", "command", "is_adopted"),
    [
        (2, b"/sbin/init", False),
        (1, b"/sbin/init", True),
        (1, b"docker-init\0--", True),
        (1, b"python\0-m\0torch.distributed.run", False),  # a container's only command
        (1, b"/usr/bin/torchrun\0--standalone", False),
        (1, b"slurmstepd: [7.0]", False),
        (1, b"/usr/bin/python3\0launch.py", False),
    ],
)
def test_who_has_become_inits_child_has_lost_its_launcher(
    parent: int, command: bytes, is_adopted: bool, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(family, "_INIT", tmp_path / "cmdline")
    assert not family._is_adopted(parent)  # nobody knows
    (tmp_path / "cmdline").write_bytes(command)
    assert family._is_adopted(parent) == is_adopted
    asked: list[str] = []
    monkeypatch.setattr(family.os, "getppid", lambda: parent)
    monkeypatch.setattr(family.stop, "ask", lambda: asked.append("to stop"))
    is_over = threading.Event()
    is_over.set()
    family._watch(parent, is_over, 60.0)
    assert asked == ["to stop"] * is_adopted


def test_nobody_looks_at_a_launcher_once_the_run_is_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = set(threading.enumerate())
    with family.watching_launcher(60.0):
        (watch,) = set(threading.enumerate()) - before
    watch.join(10)
    assert not watch.is_alive()


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
