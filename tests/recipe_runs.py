"""Recipes as a user starts them: processes, by python, by torchrun, or rank by rank."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run")


@dataclass
class Started:
    """A process that was started, and where its words go."""

    process: subprocess.Popen
    out: Path
    err: Path

    def said(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Its descendants that live."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if is_living(child)]

    def ranks(self) -> list[psutil.Process]:
        """Those of them that are ranks of a recipe."""
        found = []
        for child in self.family():
            with contextlib.suppress(psutil.Error):
                if any(word.startswith("recipes/") for word in child.cmdline()):
                    found.append(child)
        return sorted(found, key=lambda child: child.pid)

    def wait(self, seconds: float) -> int:
        """Return its exit status; an error where it still runs then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()}") from None

    def end(self) -> None:
        """Kill it and its descendants, whatever they are at."""
        for each in [*self.family(), self.process]:
            each.kill()
        self.process.wait()


def is_living(process: psutil.Process) -> bool:
    """Return whether a process is there, and no mere entry of the system's."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sft_command(files: Path, directory: Path, *options: object) -> list[str]:
    """Return a run of recipes/sft_tiny.py on the files of tests/tiny.py that saves every step."""
    words = ["recipes/sft_tiny.py", "--init-from", files / "policy", "--directory", directory]
    words += ["--data.train", files / "demonstrations.jsonl", "--data.max-prompt-tokens", 32]
    return [str(word) for word in (*words, "--save-every", 1, *options)]


def start(
    command: Iterable[str],
    folder: Path,
    *,
    launcher: Iterable[str] = (sys.executable, "-W", "ignore"),
    environment: dict[str, str] | None = None,
    **options: object,
) -> Started:
    """Start a command with the words it says in two files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    process = subprocess.Popen(
        [*launcher, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {}),
        preexec_fn=heed_signals,
        **({"stdout": out.open("wb"), "stderr": err.open("wb")} | options),  # type: ignore[call-overload]
    )
    return Started(process, out, err)


def heed_signals() -> None:
    """Have this process heed what whoever runs the tests ignores, as with nohup or behind "&"."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_ranks(command: list[str], folder: Path, port: int, ranks: Iterable[int] = (0, 1)) -> dict:
    """Start some of two ranks without an agent, as srun would."""
    started = {}
    for rank in ranks:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started[rank] = start(command, folder / f"rank_{rank}", environment=place | where)
    return started


def steps_logged(directory: Path) -> int:
    """Return how many steps a run has logged."""
    path = directory / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def saved_step(directory: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    name = (directory / "checkpoints" / "latest").read_text().strip()
    return json.loads((directory / "checkpoints" / name / "progress.json").read_text())["step"]


def until(holds: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until something holds."""
    last = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < last, "it took too long"
        time.sleep(0.05)


def freeze(pid: int) -> None:
    """Stop a process, as SIGSTOP does."""
    os.kill(pid, signal.SIGSTOP)
