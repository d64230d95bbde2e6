"""Recipes as they are started, alone or by torchrun, struck from without: while they import what
they need, meet, train or save; torchrun's own process too."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.stop import EXIT_STATUS, SIGNALS
from tests.chaos.killed_runs import ROOT
from tests.chaos.test_chaos import Case, assert_same, prepared

MARK = "TRIDENT_CHAOS"  # in the environment of all that a run starts
MOST_SECONDS = 120.0  # in which ranks whose launcher is gone have ended
RECIPES = {"sft": "sft_tiny", "rm": "rm_tiny", "ppo": "ppo_tiny"}


@dataclasses.dataclass(kw_only=True)
class Launched:
    """A run under way, with all of its processes."""

    process: subprocess.Popen
    mark: str
    output: Path
    directory: Path
    whole: Path
    """That of an undisturbed run."""

    def processes(self) -> list[psutil.Process]:
        """All that live, the launcher first."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: (process.pid != self.process.pid, process.pid))

    def wait_for_all(self, seconds: float, halted: psutil.Process | None = None) -> float:
        """Wait until none is left, but for one that is halted, and kill that; return the seconds
        that took."""
        start = time.monotonic()
        while [process for process in self.processes() if process != halted]:
            assert time.monotonic() < start + seconds, self.left()
            time.sleep(0.2)
        took = time.monotonic() - start
        if halted is not None and halted.is_running():
            halted.kill()
        self.process.wait()
        return took

    def is_left_to(self, agent: psutil.Process, halted: psutil.Process) -> bool:
        """Return whether the other ranks come to the run's end, its last step saved, and leave a
        halted one to an agent that waits for it: nobody is there to miss it."""
        last = time.monotonic() + 10.0  # no rank that waits for another ends so soon
        while {*self.processes()} - {agent, halted}:
            if time.monotonic() > last:
                return False
            time.sleep(0.2)
        saved = [folder / "checkpoints/latest" for folder in (self.directory, self.whole)]
        is_over = saved[0].exists() and saved[0].read_text() == saved[1].read_text()
        return is_over and halted.is_running()

    def left(self) -> str:
        """Return in words who lives, in which state, and what was said last."""
        lines = [f"{p.pid} {p.status()} {' '.join(p.cmdline())[:120]}" for p in self.processes()]
        return "\n".join(["", *lines, self.output.read_text()[-3000:]])


def launch(case: Case, directory: Path) -> Launched:
    recipe = ROOT / f"recipes/{RECIPES[case.name.partition('-')[0]]}.py"
    options = [recipe, "--config", case.whole, "--directory", directory]
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.num_ranks}"]
    command = [sys.executable, *(ranks if case.num_ranks > 1 else []), *options]
    mark = uuid.uuid4().hex
    output = case.whole.with_name(f"output-{mark}")
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    return Launched(
        process=process, mark=mark, output=output, directory=directory, whole=case.whole
    )


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    runs: list[Launched] = []
    yield runs
    for process in (process for each in runs for process in each.processes()):
        process.kill()


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["sft-dp2", "ppo-1", "rm-tp2"])
def test_struck_launches_leave_nobody_behind_and_lose_nothing(
    name: str,
    launched: list[Launched],
    tiny: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
):
    start = time.monotonic()
    case = prepared(name, tiny, tmp_path, pytestconfig.getoption("--chaos-seed"))
    draw: random.Random = case.draw
    directory, whole_seconds = tmp_path / "run", 0.0
    try:
        for number in range(max(1, pytestconfig.getoption("--chaos") // 30)):
            run = launch(case, directory)
            launched.append(run)
            time.sleep(draw.uniform(0.5, whole_seconds or 14.0))
            strike_launch(case, run)
            case.phases["any moment of a launch"] += 1
            if number % 3 == 2:
                case.seen["ends_compared"] += 1
                whole_seconds = finish(case, launched, directory)
                subprocess.run(["rm", "-rf", directory], check=True)
        if directory.exists() or not case.seen["ends_compared"]:
            case.seen["ends_compared"] += 1
            finish(case, launched, directory)
    finally:
        case.record(pytestconfig.getoption("--record"), time.monotonic() - start)


def strike_launch(case: Case, run: Launched) -> None:
    """Strike what there is of a launch, and see that it ends in time with nobody left."""
    there, draw = run.processes(), case.draw
    if not there:
        assert run.process.wait() == 0, run.output.read_text()[-3000:]
    elif case.num_ranks == 1:
        strike = draw.choice([signal.SIGKILL, *SIGNALS])
        case.kinds[strike.name] += 1
        run.process.send_signal(strike)
        run.wait_for_all(MOST_SECONDS)
        # Before the recipe notes signals, Python dies of them.
        ends = (0, EXIT_STATUS, -strike, 130)
        assert run.process.returncode in ends, run.output.read_text()[-3000:]
    else:
        strike_one(case, run, there)


def strike_one(case: Case, run: Launched, there: list[psutil.Process]) -> None:
    """Strike torchrun, or a rank where there is one, and see all of them end."""
    agent, *ranks = there
    draw = case.draw
    if ranks and draw.random() < 0.4:
        halts = draw.random() < 0.3
        struck, strike = draw.choice(ranks), signal.SIGSTOP if halts else signal.SIGKILL
    else:
        struck = agent
        strike = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, *SIGNALS))
    case.kinds[f"{strike.name} to {'the agent' if struck == agent else 'a rank under it'}"] += 1
    struck.send_signal(strike)
    # A rank that is halted is killed by the agent, which nobody ends where it is halted itself.
    is_lasting = struck == agent and strike == signal.SIGSTOP
    if struck != agent and strike == signal.SIGSTOP and run.is_left_to(agent, struck):
        case.seen["halted after the others' end"] += 1
        struck.kill()
    took = run.wait_for_all(MOST_SECONDS, agent if is_lasting else None)
    case.seen["most_seconds"] = max(case.seen["most_seconds"], int(took))


def finish(case: Case, launched: list[Launched], directory: Path) -> float:
    """Have the same command come to its end; return its seconds."""
    start = time.monotonic()
    run = launch(case, directory)
    launched.append(run)
    assert run.process.wait() == 0, run.output.read_text()[-3000:]
    run.wait_for_all(5.0)
    assert_same(directory, case.whole)
    return time.monotonic() - start
