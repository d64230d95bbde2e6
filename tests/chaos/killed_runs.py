"""Runs that SIGKILL ends, at a line of a save or at any moment, and what is left of them.

Every rank is a process of its own, forked from one that has imported what it needs, in which a
recipe's own frame runs the stage. It notes where a save stands in a file that outlives it.
"""

import collections
import dataclasses
import gc
import itertools
import json
import mmap
import multiprocessing.connection
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import engine.metrics
from engine import ppo, rm, sft
from engine.checkpoints import background, saving
from engine.ranks import failure
from engine.recipe import run_stage
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from tests.ranks import START_METHOD

ROOT = Path(__file__).parents[3]
Config = SFTConfig | RMConfig | PPOConfig
STAGES: dict[type, Callable] = {SFTConfig: sft.train, RMConfig: rm.train, PPOConfig: ppo.train}
# Between two lines of these the disk, or what the ranks know of each other, may change.
SOURCES = ("background", "checkpointer", "manifest", "saving", "tensor_file")
WATCHED = {
    *(str(ROOT / f"engine/checkpoints/{name}.py") for name in SOURCES),
    str(ROOT / "engine/files.py"),
    str(ROOT / "engine/ranks/decision.py"),
    shutil.__file__,
}
# Of those, what computes in memory: thousands of lines between which nothing changes.
UNWATCHED = {"header", "stage", "num_bytes", "_snapshot", "_as_tuple", "<genexpr>", "<dictcomp>"}
CLOCKS = ("seconds", "tokens_per_s")
LINE_BYTES = 80
SHORT_WRITE = 16384  # bytes of a write at most, so that files are torn within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """How a run is to be killed: its rank at a line, or all ranks after some seconds."""

    rank: int = 0
    line: str = ""
    """WHAT FILE:NUMBER, of a "save", by its thread, the "start" of one, or else in the "run"."""
    nth: int = 1
    """The so manieth time that the rank comes to the line."""
    seconds: float = 0.0
    others_live: float = 0.0
    """Seconds that the other ranks have to end by themselves before they are killed too."""
    sync_seconds: float = 0.0
    """Added to every sync: a save that takes its time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended."""

    codes: list[int]
    """Exit codes by rank."""
    lines: list[str]
    """By rank: the line of a save that it stood at, "" outside of saves."""
    ended_alone: bool
    """Whether no rank had to be killed because another was."""
    num_left: int
    """Processes of the run that lived on."""
    seconds: float
    output: str

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.codes


class Watch:
    """Where the saves of this process stand, in a file; kills the process at one line."""

    def __init__(self, path: Path, death: Death | None) -> None:
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as stream:
            self._shown = mmap.mmap(stream.fileno(), mmap.PAGESIZE)
        self._death = death
        self._main = "run"  # what the main thread does: "start" a save, or not
        self.counts: collections.Counter[str] = collections.Counter()

    def install(self) -> None:
        """Watch the saves' threads, and what the main thread does with files."""
        threading.settrace(self._call_in_thread)  # type: ignore[arg-type]
        work, start = background.Background._run, saving.Saver.start

        def watched_work(*arguments: Any) -> None:
            work(*arguments)
            self._shown[0] = 0

        def watched_start(*arguments: Any) -> None:
            self._main = "start"
            start(*arguments)
            self._main = "run"

        background.Background._run = watched_work  # type: ignore[method-assign]
        saving.Saver.start = watched_start  # type: ignore[method-assign]
        sys.settrace(self._call)  # type: ignore[arg-type]

    def _call_in_thread(self, frame: FrameType, event: str, argument: Any) -> Any:
        is_saving = threading.current_thread().name.startswith("saving ")
        return self._call(frame, event, argument) if is_saving else None

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        is_watched = code.co_filename in WATCHED and code.co_name not in UNWATCHED
        return self._line if is_watched else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            is_main = threading.current_thread() is threading.main_thread()
            what = self._main if is_main else "save"
            file = frame.f_code.co_filename.rpartition("/")[2]
            line = f"{what} {file}:{frame.f_lineno}"
            self.counts[line] += 1
            if what != "run":  # a save, which has ended once byte 0 is 0
                self._shown[:LINE_BYTES] = b"\1" + line.encode().ljust(LINE_BYTES - 1)
            death = self._death
            if death and line == death.line and self.counts[line] == death.nth:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def shown_in(path: Path) -> str:
    """Return the line of a save that a watched process stands at, or stood at when it died."""
    shown = path.read_bytes()[:LINE_BYTES] if path.exists() else bytes(1)
    return shown[1:].decode().strip() if shown[0] else ""


def live(rank: int, config: Config, notes: Path, environment: dict[str, str], death: Death) -> None:
    """Be one rank of a run, watched, to its end."""
    os.setsid()  # whatever it starts is known by its group
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(notes / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    write, sync = os.write, os.fsync

    def sync_slowly(number: int) -> None:
        time.sleep(death.sync_seconds)
        sync(number)

    os.write = lambda number, data: write(number, data[:SHORT_WRITE])
    os.fsync = sync_slowly  # type: ignore[assignment]
    engine.metrics.plot_curves = lambda run_dir: None  # takes longer than training
    gc.freeze()
    watch = Watch(notes / f"line-{rank}", death if death.rank == rank else None)
    watch.install()
    try:
        run_stage(STAGES[type(config)], config, [])
    finally:
        failure.part()  # as Python does where multiprocessing does not end it
    (notes / f"counts-{rank}").write_text(json.dumps(watch.counts))


def run(config: Config, notes: Path, *, num_ranks: int = 1, death: Death | None = None) -> End:
    """Run a stage on ranks of its own until it ends or dies; what they say goes to `notes`."""
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    death = death or Death()
    context = torch.multiprocessing.get_context(START_METHOD)
    ranks = [
        context.Process(target=live, args=(rank, config, notes, environment, death))
        for rank in range(num_ranks)
    ]
    start = time.monotonic()
    for process in ranks:
        process.start()
    if death.seconds:
        wait_for_any(ranks, death.seconds)
    else:
        wait_for_any(ranks, 120.0)
        wait_for_all(ranks, death.others_live if any_killed(ranks) else 60.0)
    lines = [shown_in(notes / f"line-{rank}") for rank in range(num_ranks)]
    ended_alone = not any(process.is_alive() for process in ranks)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join(60.0)
    return End(
        codes=[process.exitcode for process in ranks],  # type: ignore[misc]
        lines=lines,
        ended_alone=ended_alone,
        num_left=sum(has_processes(process.pid) for process in ranks),  # type: ignore[arg-type]
        seconds=time.monotonic() - start,
        output="".join(path.read_text() for path in sorted(notes.glob("output-*"))),
    )


def any_killed(ranks: list) -> bool:
    return any(process.exitcode == -signal.SIGKILL for process in ranks)


def wait_for_any(ranks: list, seconds: float) -> None:
    multiprocessing.connection.wait([process.sentinel for process in ranks], seconds)


def wait_for_all(ranks: list, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def has_processes(group: int) -> bool:
    """Return whether a process group stays alive. What tries a tokenizer outlives its rank by a
    second or two (engine/data/tokenizer_trial.py); whatever else a run had would stay."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def lines_in(notes: Path, rank: int) -> dict[str, int]:
    """Return how often a rank that has ended came to each line of a save."""
    return json.loads((notes / f"counts-{rank}").read_text())


def set_back(whole: Path, directory: Path) -> None:
    """Copy a run and have it go on from the checkpoint before its last, which it will replace."""
    shutil.copytree(whole, directory)
    steps = sorted(path.name for path in (directory / "checkpoints").glob("step_*"))
    (directory / "checkpoints" / "latest").write_text(steps[-2])


def temporary_files(directory: Path) -> list[str]:
    """Return what in a run's folder is there only while something is written or removed."""
    found = itertools.chain(*(directory.rglob(f"*.{end}") for end in ("partial", "replaced")))
    return sorted(str(path.relative_to(directory)) for path in found)


def differences(directory: Path, whole: Path) -> list[str]:
    """Return what of a run is not bit for bit that of another, but for what clocks say."""
    checkpoints = contents(directory / "checkpoints"), contents(whole / "checkpoints")
    pairs = {
        f"checkpoints/{name}": [c.get(name) for c in checkpoints]
        for name in checkpoints[0].keys() | checkpoints[1].keys()
    }
    for name in ("metrics", "samples", "alarms"):
        pairs[name] = [rows(path / f"{name}.jsonl") for path in (directory, whole)]
    return sorted(name for name, (ours, theirs) in pairs.items() if ours != theirs)


def contents(folder: Path) -> dict[str, Any]:
    """Return every file beneath a folder: its bytes, or its JSON without what clocks say."""
    found: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.name == "progress.json":
            found[name] = without_clocks(json.loads(found[name]))
        if path.name == "manifest.json":  # the progress has another checksum
            manifest = json.loads(found[name])["manifest"]
            found[name] = manifest | {
                "files": {k: v for k, v in manifest["files"].items() if k != "progress.json"}
            }
    return found


def rows(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [without_clocks(json.loads(line)) for line in path.read_text().splitlines()]


def without_clocks(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: without_clocks(inner)
        for key, inner in value.items()
        if not key.endswith(CLOCKS) and not key.startswith("memory/")
    }
