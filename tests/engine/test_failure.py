"""A rank that fails ends the others at once, wherever they are."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, sys, time
import torch
import torch.distributed as dist
from engine.config import UserError, run_stage
from engine.parallel import end_parallel, said_by_first_rank, start_parallel
from engine.settings.layout import ParallelLayout

@dataclasses.dataclass(frozen=True)
class Config:
    layout: ParallelLayout = ParallelLayout()

def train(config):
    parallel = start_parallel(config.layout, 0)
    failing, way, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.barrier()
    if way == "end":
        time.sleep(float(kind) * (parallel.rank == failing))
        return
    if parallel.rank == failing:
        raise {"user": UserError, "bug": ValueError}[kind]("the memory is full")
    if way == "collective":
        dist.all_reduce(torch.ones(1))
    elif way == "device":  # as in a kernel of NCCL, which no exception reaches
        time.sleep(300)
    elif way == "store":
        said_by_first_rank(lambda: time.sleep(300))

run_stage(train, Config(), [], has_dry_run=False)
"""


def start_two(*arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(rank, port, *arguments) for rank in range(2)]


def start(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        env=os.environ | place | {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("failing", "way", "kind"),
    [
        (1, "collective", "bug"),
        (0, "device", "bug"),
        (1, "store", "user"),
    ],
)
def test_one_failure_ends_all_ranks_with_one_message(failing: int, way: str, kind: str):
    ranks = start_two(str(failing), way, kind)
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    status = 2 if kind == "user" else 1
    assert [process.returncode for process in ranks] == [status, status], errors
    last = errors[failing].splitlines()[-1]
    assert "the memory is full" in last
    assert errors[failing].count("Traceback") == (kind == "bug")
    told = last.removeprefix("[rank 1] ")
    assert errors[1 - failing] == (f"rank 1 failed: {told}\n" if failing == 1 else "")


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3, 3])
def test_rank_that_ends_in_order_ends_no_other_and_nobody_complains(later: int, seconds: float):
    ranks = start_two(str(later), "end", str(seconds))
    for process in (ranks[1 - later], ranks[later]):
        started = time.monotonic()
        assert process.communicate(timeout=120) == ("", "")
        assert process.returncode == 0
    assert time.monotonic() - started < 9  # nobody waited for the rank that was gone
