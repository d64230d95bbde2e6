"""Runs that a blow ends, stops or asks to leave, at any moment of their lives, and what is left of
them.

Every rank is a process of its own, forked from one that has imported what it needs, in which a
recipe's own frame runs the stage. It notes where it stands in a file that outlives it, and strikes
itself when it comes to where it is to be struck.
"""

import collections
import dataclasses
import gc
import itertools
import json
import mmap
import multiprocessing.connection
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

import engine.metrics
from engine import ppo, rm, sft
from engine.checkpoints import background, saving
from engine.checkpoints.checkpointer import Checkpointer
from engine.metrics import Metrics
from engine.ranks import failure
from engine.recipe import run_stage
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from tests.ranks import START_METHOD

ROOT = Path(__file__).parents[2]
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
PHASE_AT, STEPS_AT = 128, 256  # bytes of a rank's notes
SHORT_WRITE = 16384  # bytes of a write at most, so that files are torn within
PATIENCE = 3.0  # seconds that ranks have to notice that another was killed by the system
NO_LIMIT = resource.RLIM_INFINITY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blow:
    """What befalls a run: signals to some ranks where they stand at a line or in a phase, or after
    some seconds; files that may not grow."""

    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    """One after the other, a moment apart; none: nothing befalls it."""
    ranks: tuple[int, ...] = (0,)
    line: str = ""
    """WHAT FILE:NUMBER, of a "save", by its thread, the "start" of one, or else in the "run"."""
    phase: str = ""
    """Where there is no line: the part of a run's life, of `Watch`, or a phase of its steps."""
    nth: int = 1
    """The so manieth time that the rank comes there."""
    seconds: float = 0.0
    """After that, or after the run's start."""
    pause: float = 0.0
    """Seconds after which a rank that SIGSTOP has stopped goes on; 0: it does not."""
    others_live: float | None = None
    """Seconds that ranks have to end by themselves before they are killed too; none: 60, where one
    is dead already PATIENCE."""
    sync_seconds: float = 0.0
    """Added to every sync: a save that takes its time."""
    file_bytes: int = NO_LIMIT
    """The longest that a file may get."""

    @property
    def kind(self) -> str:
        """A word for it, for the record."""
        if self.file_bytes != NO_LIMIT:
            return "file limit"
        if signal.SIGSTOP in self.signals:
            return "pause" if self.pause else "halt"
        names = " twice".join(["", ""][: len(self.signals)]).strip()
        return " ".join([self.signals[0].name, names]).strip() if self.signals else "none"


NOTHING = Blow(signals=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended."""

    codes: list[int]
    """Exit codes by rank."""
    lines: list[str]
    """By rank: the line of a save that it stood at, "" outside of them or where none is watched."""
    phases: list[str]
    """By rank: the part of its life that it was in."""
    steps: tuple[int, int] | None
    """The step that it began with, and those that were done; none: it did not begin."""
    ended_alone: bool
    """Whether no rank had to be killed because another was struck."""
    num_left: int
    """Processes of the run that lived on."""
    seconds: float
    outputs: list[str]
    """What each rank said."""

    @property
    def output(self) -> str:
        """What all said, rank by rank."""
        return "".join(self.outputs)

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.codes


class Watch:
    """Where this process stands, in a file: a line of a save, a part of a run's life ("start", when
    its ranks have yet to join, "join", "load", "steps" and what a stage times in them, "boundary",
    "end", "over"), the steps done. Strikes the process where it is to be struck."""

    def __init__(self, path: Path, blow: Blow) -> None:
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as stream:
            self._shown = mmap.mmap(stream.fileno(), mmap.PAGESIZE)
        self._blow = blow
        self._main = "run"  # what the main thread does: "start" a save, or not
        self._has_struck = False
        self.counts: collections.Counter[str] = collections.Counter()

    def install(self, stage: Any, *, sees_lines: bool) -> None:
        """Watch the run's life and, where lines are asked for, the saves' threads and what the main
        thread does with files."""
        self.enter("start")
        self._wrap(stage, "join_ranks", "join", after="load")
        self._wrap(Metrics, "__enter__", "steps")
        self._wrap(Checkpointer, "boundary", "boundary", after="steps")
        self._wrap(Metrics, "__exit__", "end")
        phase, log, init = Metrics.phase, Metrics.log, Metrics.__init__

        def entered_phase(metrics: Metrics, name: str) -> Any:
            self.enter(name)
            return phase(metrics, name)

        def counted_log(metrics: Metrics, step: int, values: Mapping[str, float]) -> None:
            log(metrics, step, values)
            self._show(STEPS_AT, f"{metrics._first_step} {step + 1}")

        def counted_init(metrics: Metrics, *arguments: Any, **named: Any) -> None:
            init(metrics, *arguments, **named)
            self._show(STEPS_AT, f"{metrics._first_step} {metrics._first_step}")

        Metrics.phase, Metrics.log = entered_phase, counted_log  # type: ignore[method-assign, assignment]
        Metrics.__init__ = counted_init  # type: ignore[method-assign, assignment]
        if sees_lines:
            self._install_lines()

    def _install_lines(self) -> None:
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

    def _wrap(self, owner: Any, name: str, phase: str, after: str = "") -> None:
        """Have a function's call be a part of the run's life, and another come after it."""
        function = getattr(owner, name)

        def entered(*arguments: Any, **named: Any) -> Any:
            self.enter(phase)
            try:
                return function(*arguments, **named)
            finally:
                if after:
                    self.enter(after)

        setattr(owner, name, entered)

    def enter(self, phase: str) -> None:
        """Come to a part of the run's life."""
        self._show(PHASE_AT, phase)
        key = f"phase {phase}"
        self.counts[key] += 1
        blow = self._blow
        if blow.phase == phase and self.counts[key] == blow.nth and not self._has_struck:
            self._has_struck = True
            timer = threading.Timer(blow.seconds, self._strike)
            timer.daemon = True  # a run that has ended does not wait for it
            timer.start()

    def _strike(self) -> None:
        for number in self._blow.signals:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    def _show(self, start: int, text: str) -> None:
        self._shown[start : start + LINE_BYTES] = text.encode().ljust(LINE_BYTES)

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
            if line == self._blow.line and self.counts[line] == self._blow.nth:
                self._strike()
        return self._line


def shown_in(path: Path) -> tuple[str, str, tuple[int, int] | None]:
    """Return the line of a save, the part of its life and the steps that a watched process stands
    at, or stood at when it died."""
    shown = path.read_bytes() if path.exists() else b""
    if not shown:
        return "", "", None
    line = shown[1:LINE_BYTES].decode().strip() if shown[0] else ""
    phase, steps = (
        shown[start : start + LINE_BYTES].decode().strip("\0 ") for start in (PHASE_AT, STEPS_AT)
    )
    first, _, done = steps.partition(" ")
    return line, phase, (int(first), int(done)) if steps else None


def live(rank: int, config: Config, notes: Path, environment: dict[str, str], blow: Blow) -> None:
    """Be one rank of a run, watched, to its end."""
    os.setsid()  # whatever it starts is known by its group
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(notes / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    write, sync = os.write, os.fsync

    def sync_slowly(number: int) -> None:
        time.sleep(blow.sync_seconds)
        sync(number)

    os.write = lambda number, data: write(number, data[:SHORT_WRITE])
    os.fsync = sync_slowly  # type: ignore[assignment]
    engine.metrics.plot_curves = lambda run_dir: None  # takes longer than training
    gc.freeze()
    is_struck = rank in blow.ranks
    watch = Watch(notes / f"line-{rank}", blow if is_struck else NOTHING)
    train = STAGES[type(config)]
    watch.install(sys.modules[train.__module__], sees_lines=bool(blow.line) or blow == NOTHING)
    if is_struck:
        resource.setrlimit(resource.RLIMIT_FSIZE, (blow.file_bytes, NO_LIMIT))
    try:
        run_stage(train, config, [])
        watch.enter("over")
    finally:
        failure.part()  # as Python does where multiprocessing does not end it
    (notes / f"counts-{rank}").write_text(json.dumps(watch.counts))


def run(config: Config, notes: Path, *, num_ranks: int = 1, blow: Blow = NOTHING) -> End:
    """Run a stage on ranks of its own until it ends or dies; what they say goes to `notes`."""
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    context = torch.multiprocessing.get_context(START_METHOD)
    ranks = [
        context.Process(target=live, args=(rank, config, notes, environment, blow))
        for rank in range(num_ranks)
    ]
    start = time.monotonic()
    for process in ranks:
        process.start()
    if not (blow.line or blow.phase) and blow.signals:
        wait_for_any(ranks, blow.seconds)
        for number in blow.signals:
            strike([ranks[rank] for rank in blow.ranks], number)
    wait_for_ends(ranks, blow)
    shown = [shown_in(notes / f"line-{rank}") for rank in range(num_ranks)]
    ended_alone = not any(process.is_alive() and not is_stopped(process) for process in ranks)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join(60.0)
    return End(
        codes=[process.exitcode for process in ranks],  # type: ignore[misc]
        lines=[line for line, _, _ in shown],
        phases=[phase for _, phase, _ in shown],
        steps=shown[0][2],
        ended_alone=ended_alone,
        num_left=sum(has_processes(process.pid) for process in ranks),  # type: ignore[arg-type]
        seconds=time.monotonic() - start,
        outputs=[path.read_text(errors="replace") for path in sorted(notes.glob("output-*"))],
    )


def strike(ranks: list, number: signal.Signals) -> None:
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, number)


def wait_for_ends(ranks: list, blow: Blow) -> None:
    """Wait until all ranks have ended, or those that were not struck have had their time."""
    deadline = time.monotonic() + 120.0
    is_struck = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        stopped = [process for process in ranks if is_stopped(process)]
        if stopped and blow.pause:
            time.sleep(blow.pause)
            strike(stopped, signal.SIGCONT)
        elif not is_struck and (stopped or any(p.exitcode not in (None, 0) for p in ranks)):
            is_struck = True
            is_dead = any((process.exitcode or 0) < 0 for process in ranks)
            patience = PATIENCE if is_dead else 60.0
            if blow.others_live is not None:
                patience = blow.others_live
            deadline = min(deadline, time.monotonic() + patience)
        if is_struck and all(is_stopped(p) for p in ranks if p.is_alive()):
            return  # nobody is left to end by himself
        wait_for_any([process for process in ranks if process.is_alive()], 0.05)


def is_stopped(process: Any) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def wait_for_any(ranks: list, seconds: float) -> None:
    multiprocessing.connection.wait([process.sentinel for process in ranks], seconds)


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


def counts_in(notes: Path, rank: int) -> dict[str, int]:
    """Return how often a rank that has ended came to each line of a save and part of its life."""
    return json.loads((notes / f"counts-{rank}").read_text())


def set_back(whole: Path, directory: Path) -> None:
    """Copy a run and have it go on from the checkpoint before its last, which it will replace."""
    shutil.copytree(whole, directory, dirs_exist_ok=True)
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
