"""A rank that fails ends the others at once, wherever they are."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipe_runs import freeze, sft_command, start_ranks, steps_logged, until
from tests.test_slurm import free_ports

ROOT = Path(__file__).parents[3]
PROGRAM = """
import dataclasses, sys, time
import torch
import torch.distributed as dist
from engine.errors import UserError
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.start import end_parallel, start_parallel
from engine.recipe import run_stage
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


# A rank is a whole run of Python, to its end, for which torch would be imported 22 times. So one
# process imports it and forks the ranks; it is told which, or whose exit status is wanted.
FORKS = """
import json, os, sys
import engine.ranks.start
for line in sys.stdin:
    order = json.loads(line)
    if "pid" in order:
        pid, status = os.waitpid(order["pid"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "runs", flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for number, path in ((1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(order["environment"])
    sys.argv[1:] = order["arguments"]
    exec(order["program"], {"__name__": "__main__"})
    break
"""


class Forks:
    """The process that forks the ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKS],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start_two(self, *arguments: str) -> list["Rank"]:
        """Start two ranks that are to meet."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return [self._start(rank, port, arguments) for rank in range(2)]

    def _start(self, rank: int, port: int, arguments: tuple[str, ...]) -> "Rank":
        paths = {name: str(self.folder / f"{port} {rank} {name}") for name in ("stdout", "stderr")}
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = place | {"MASTER_PORT": str(port)}
        order = {"program": PROGRAM, "arguments": arguments, "environment": environment}
        return Rank(self, int(self.answer(order | paths)), *map(Path, paths.values()))

    def answer(self, order: dict) -> str:
        """Return the line that answers an order."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@dataclass
class Rank:
    """One forked rank."""

    forks: Forks
    pid: int
    stdout: Path
    stderr: Path

    def end(self, seconds: float) -> tuple[int, str, str]:
        """Wait at most so long for its end; return its exit status, and what it said where."""
        deadline = time.monotonic() + seconds
        while (status := self.forks.answer({"pid": self.pid})) == "runs":
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"it still ran after {seconds} s")
            time.sleep(0.01)
        return int(status), self.stdout.read_text(), self.stderr.read_text()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("ranks"))
    yield forks
    forks.process.communicate()


@pytest.mark.parametrize(
    ("failing", "way", "kind"),
    [
        (1, "collective", "bug"),
        (0, "device", "bug"),
        (1, "store", "user"),
    ],
)
def test_one_failure_ends_all_ranks_with_one_message(
    failing: int, way: str, kind: str, forks: Forks
):
    ranks = forks.start_two(str(failing), way, kind)
    statuses, _, errors = zip(*(rank.end(200) for rank in ranks), strict=True)
    status = 2 if kind == "user" else 1
    assert statuses == (status, status), errors
    last = errors[failing].splitlines()[-1]
    assert "the memory is full" in last
    assert errors[failing].count("Traceback") == (kind == "bug")
    told = last.removeprefix("[rank 1] ")
    assert errors[1 - failing] == (f"rank 1 failed: {told}\n" if failing == 1 else "")


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3, 3])
def test_rank_that_ends_in_order_ends_no_other_and_nobody_complains(
    later: int, seconds: float, forks: Forks
):
    ranks = forks.start_two(str(later), "end", str(seconds))
    for rank in (ranks[1 - later], ranks[later]):
        started = time.monotonic()
        assert rank.end(120) == (0, "", "")
    assert time.monotonic() - started < 9  # nobody waited for the rank that was gone


ENDED = re.compile("error: .*(phase|--waiting)")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_with_one_message(stopped: int, tiny: Path, tmp_path: Path):
    waiting = ("--waiting.silence-seconds", 20)
    command = sft_command(tiny, tmp_path / "run", "--epochs", 4000, "--layout.tp", 2, *waiting)
    ranks = start_ranks(command, tmp_path, free_ports()[0])
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        freeze(ranks[stopped].process.pid)
        living = ranks[1 - stopped]
        assert living.wait(100) == 1
        said = living.err.read_text()
        assert len(ENDED.findall(said)) == 1
        assert "Traceback" not in said
        who = "rank 1 of 2 gave no sign of life" if stopped else "the first rank or torchrun keeps"
        assert who in said
        stacks = tmp_path / "run" / "stacks" / f"rank_{1 - stopped}.txt"
        assert "most recent call first" in stacks.read_text()
    finally:
        for rank in ranks.values():
            rank.end()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_message(killed: int, tiny: Path, tmp_path: Path):
    command = sft_command(tiny, tmp_path / "run", "--epochs", 4000, "--layout.tp", 2)
    ranks = start_ranks(command, tmp_path, free_ports()[0])
    try:
        until(lambda: steps_logged(tmp_path / "run") > 2)
        ranks[killed].process.kill()
        living = ranks[1 - killed]
        assert living.wait(100) == 1
        assert len(ENDED.findall(living.err.read_text())) == 1
        assert "Traceback" not in living.said()
    finally:
        for rank in ranks.values():
            rank.end()


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_rank_that_never_comes_is_named(present: int, tiny: Path, tmp_path: Path):
    waiting = ("--waiting.join-seconds", 4)
    command = sft_command(tiny, tmp_path / "run", "--layout.tp", 2, *waiting)
    (rank,) = start_ranks(command, tmp_path, free_ports()[0], [present]).values()
    try:
        assert rank.wait(100) == 2
        (line,) = rank.err.read_text().splitlines()
        assert ("rank 1 of 2 did not come" if present == 0 else "found nobody to meet") in line
        assert not (tmp_path / "run").exists()
    finally:
        rank.end()


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_port_of_another_program_is_one_line(present: int, tiny: Path, tmp_path: Path):
    waiting = ("--waiting.join-seconds", 3)
    command = sft_command(tiny, tmp_path / "run", "--layout.tp", 2, *waiting)
    with socket.create_server(("127.0.0.1", 0)) as other:
        (rank,) = start_ranks(command, tmp_path, other.getsockname()[1], [present]).values()
        try:
            assert rank.wait(100) == 2
            assert len(rank.err.read_text().splitlines()) == 1
        finally:
            rank.end()
