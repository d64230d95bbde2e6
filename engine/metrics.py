"""What a run says about itself: metrics.jsonl, TensorBoard, a line a step, sample tables, curves.

The same keys everywhere, `phase/name`; steps count from 0. Only the writing rank has files and a
voice; on the others the phase timers run and the rest does nothing. What cannot be written ends the
run in a line. Rows are not forced to the disk: a power cut may take the last ones, and a resume
writes those after its checkpoint again. A row that is damaged is set aside, for logs are no state.
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from engine.alarms import Alarm
from engine.claim import check_claim
from engine.files import open_file, replacing, writing
from engine.printable import ERROR_CHARACTERS, open_console, printable, say, short_number
from engine.ranks.signs import end_training, in_phase, reach_step

SFT_HEADLINE = (
    "train/loss",
    "train/pretrain_loss",
    "valid/loss",
    "valid/reward",
    "train/lr",
    "train/tokens_per_s",
)
RM_HEADLINE = ("train/loss", "train/pair_accuracy", "valid/pair_accuracy", "train/tokens_per_s")
PPO_HEADLINE = (
    *("score/reward_mean", "score/kl", "valid/reward_mean", "valid/kl"),
    "rollout/response_tokens",
    "rollout/eos_rate",
    "update/policy_loss",
    "update/value_loss",
    "update/ptx_loss",
    "time/step_seconds",
)

# The most characters on screen; our choices. The files have all of them.
_TITLE_CHARACTERS = 100
_CELL_CHARACTERS = 400
_LINE_CHARACTERS = 4000


class Metrics:
    """The record of one run, open while it trains: `with Metrics(...) as metrics:`.

    Writes run_dir/{metrics,samples,alarms}.jsonl and run_dir/tensorboard. A run that resumes names
    its `first_step`, and lines that a stopped run left from that step on are removed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_writer: bool,
        num_steps: int,
        first_step: int = 0,
        headline: Sequence[str] = (),
    ) -> None:
        """`headline` names the keys of the line on screen, in order; absent ones are left out."""
        self.phase_seconds: dict[str, float] = {}  # of the step under way, by phase
        self._run_dir = run_dir
        self._is_writer = is_writer
        self._num_steps = num_steps
        self._first_step = first_step
        self._headline = headline
        self._start = time.perf_counter()
        self._progress: Progress | None = None
        reach_step(first_step)
        if not is_writer:
            return
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "samples", "alarms"):
            _drop_steps_from(run_dir / f"{name}.jsonl", first_step)
        self._events = _EventFile(run_dir / "tensorboard", first_step)
        self._console = open_console()
        self._title = _title(run_dir.name)
        if self._console.is_terminal:
            self._progress = _start_progress(self._console, self._title, first_step, num_steps)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step's values and phase seconds: one line in the file and one on screen."""
        row = {f"{name}/seconds": seconds for name, seconds in self.phase_seconds.items()}
        row.update(values)
        self.phase_seconds = {}
        reach_step(step + 1)
        if not self._is_writer:
            return
        check_claim(self._run_dir)
        row = {key: float(value) for key, value in row.items()}
        # A number that is not finite has no JSON: null.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._append("metrics", {"step": step, **finite})
        self._events.add(step, {_title(key): value for key, value in row.items()})
        self._show_line(step, row)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, str | float]]) -> None:
        """Record sample texts: one line a row in samples.jsonl, and a table on screen."""
        if not self._is_writer or not rows:
            return
        for row in rows:
            self._append("samples", {"step": step, **row})
        table = Table(*map(_title, rows[0]), title=f"samples at step {step}", show_lines=True)
        for row in rows:
            table.add_row(*map(_cell, row.values()))
        self._console.print(table)

    def log_alarms(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Record alarms in alarms.jsonl and show each on a line of its own."""
        if not self._is_writer:
            return
        for alarm in alarms:
            self._append("alarms", {"step": step, "name": alarm.name, "message": alarm.message})
            self._show(f"ALARM {alarm.name}: {alarm.message}", style="bold red")

    def set_back(self, step: int) -> None:
        """Remove the rows of `step` and later, which the run takes anew; alarms stay, for what they
        tell of has been."""
        self.phase_seconds = {}
        if not self._is_writer:
            return
        for name in ("metrics", "samples"):
            _drop_steps_from(self._run_dir / f"{name}.jsonl", step)
        self._events.start(step)

    def note(self, *lines: str, cautions: Sequence[Alarm] = ()) -> None:
        """Show lines that belong to no step, such as what was read and dropped.

        cautions: what the run's settings do badly, unless it is through. They are recorded as
        alarms of its first step; what an earlier start has recorded is not said again.
        """
        if not self._is_writer:
            return
        for line in lines:
            self._show(line, style="dim")
        path = self._run_dir / "alarms.jsonl"  # rid of damaged lines
        rows = [json.loads(line) for line in _lines(path)] if path.exists() else []
        recorded = {(str(row.get("name")), str(row.get("message"))) for row in rows}
        for name, message in dict.fromkeys(cautions if self._first_step < self._num_steps else ()):
            if (name, message) not in recorded:
                row = {"step": self._first_step, "name": name, "message": message}
                self._append("alarms", row)
                self._show(f"WARNING {name}: {message}", style="bold yellow")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; its seconds are logged as `name/seconds`, summed over the step's blocks."""
        _synchronize()
        start = time.perf_counter()
        with in_phase(name, is_bounded=True):
            yield
            _synchronize()
        seconds = time.perf_counter() - start
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds

    def close(self) -> None:
        """End the progress bar, close the files and draw the curves.

        A run whose curves cannot be drawn has succeeded all the same: a line says why, no more.
        """
        end_training()
        if not self._is_writer:
            return
        if self._progress:
            self._progress.stop()
        self._events.close()
        try:
            plot_curves(self._run_dir)
        except Exception as error:  # it may not hide what ended the run, nor fail one that has not
            _warn(f"{self._run_dir / 'curves.png'} is not drawn: {error}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            _warn(f"{self._run_dir}: {error}")  # below what ended the run

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self._run_dir / f"{name}.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _show_line(self, step: int, row: Mapping[str, float]) -> None:
        keys = [key for key in self._headline or row if key in row]
        line = f"{self._title} {step + 1}/{self._num_steps}  "
        line += "  ".join(f"{key} {short_number(row[key])}" for key in keys)
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step + 1)
        else:
            seconds = (time.perf_counter() - self._start) / max(1, step + 1 - self._first_step)
            minutes, seconds = divmod(int(seconds * max(0, self._num_steps - step - 1)), 60)
            line += f"  eta {minutes}:{seconds:02d}"
        self._show(line)

    def _show(self, line: str, style: str = "") -> None:
        shown = printable(line, limit=_LINE_CHARACTERS, one_line=True)
        is_log = not self._progress  # whose lines do not break; a screen's do between words
        self._console.print(Text(shown, style=style), soft_wrap=is_log)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return a run's rows by step, each with its "step"; nan where a value was not finite.

    Says how many lines are damaged, and leaves them out. Raises UserError where there is no file.
    """
    rows: dict[int, dict[str, float]] = {}
    path, num_damaged = run_dir / "metrics.jsonl", 0
    for line in _lines(path):
        step = _step_of(line, has_numbers=True)
        if step is None:
            num_damaged += 1
            continue
        row = json.loads(line)
        finite = {key: math.nan if value is None else value for key, value in row.items()}
        rows.setdefault(step, {}).update(finite)
    if num_damaged:
        _warn(f"{path}: {num_damaged} damaged lines are left out")
    return [rows[step] for step in sorted(rows)]


def plot_curves(run_dir: Path) -> Path | None:
    """Draw every key against the step into run_dir/curves.png; None when nothing was logged.
    Memory is left out: it is the same in every iteration, and memory.txt has it as a table."""
    from matplotlib.figure import Figure  # a second that a run need not pay at its start

    rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    found = dict.fromkeys(key for row in rows for key in row if key != "step")
    keys = [key for key in found if not key.startswith("memory/")]
    if not keys:
        return None
    num_columns = min(4, len(keys))
    num_rows = math.ceil(len(keys) / num_columns)
    width, height = 4 * num_columns, 2.4 * num_rows  # inches
    figure = Figure(figsize=(width, height))
    # Margins by hand, and below titles at a given height: to find either, matplotlib would draw
    # everything twice, and PPO has 40 curves.
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.1 / width,
        bottom=0.3 / height,
        top=1 - 0.3 / height,
        wspace=0.25,
        hspace=0.35,
    )
    for i, key in enumerate(keys):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 20 else "")
        axes.set_title(_title(key), fontsize=9, y=1.0, parse_math=False)
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    path = run_dir / "curves.png"
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=90)
    return path


class _EventFile:
    """TensorBoard's file of scalars. torch's writer has a thread, which would say late, and with a
    traceback of its own, that the disk is full; this one writes at once."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # Of tensorboard, which takes a moment that only one rank pays.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # The form of the name is TensorBoard's: it reads a folder's files in their order.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        # Of several in one second and process the later ones sort later.
        self._path = folder / f"{name}.{time.monotonic_ns():020d}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("xb")
            self._records = RecordWriter(self._stream)
            self._write(Event(file_version="brain.Event:2"))
        self._session = SessionLog(status=SessionLog.START)
        self.start(first_step)

    def start(self, step: int) -> None:
        """Have nothing shown of what was written of `step` and later: a stopped run, or one that
        was set back, left it."""
        with writing(self._path):
            self._write(self._event(step=step, session_log=self._session))
            self._stream.flush()

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Write a step's values; raises UserError where that fails."""
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in row.items()]
        with writing(self._path):
            self._write(self._event(step=step, summary=self._summary(value=values)))
            self._stream.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a write that has failed: it was said
            self._stream.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Remove the rows of `first_step` and later, and a last line that a crash cut short; set
    damaged lines aside in NAME.jsonl.damaged, and say so."""
    if not os.path.lexists(path):
        return
    kept, damaged, num_lines = [], [], 0
    for line in _lines(path):
        num_lines += 1
        step = _step_of(line, has_numbers=path.name == "metrics.jsonl")
        if step is None:
            damaged += [line] if line.endswith(b"\n") else []
        elif step < first_step and line.endswith(b"\n"):
            kept.append(line)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with replacing(aside) as stream:
            stream.writelines(damaged)
        _warn(f"{path}: {len(damaged)} damaged lines are now in {aside.name}")
    if len(kept) < num_lines:
        with replacing(path) as stream:
            stream.writelines(kept)


def _lines(path: Path) -> Iterator[bytes]:
    with open_file(path) as stream:
        yield from stream


def _step_of(line: bytes, *, has_numbers: bool) -> int | None:
    """Return the step of a row in a log, None where the line is not one that was written.

    has_numbers: its other values are numbers, or null for those that were not finite.
    """
    try:
        row = json.loads(line.decode())
        step = row.pop("step")
        if has_numbers and not all(_is_number(value) for value in row.values()):
            return None
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return None
    return step if type(step) is int and step >= 0 else None


def _is_number(value: Any) -> bool:
    try:
        return value is None or (type(value) in (int, float) and math.isfinite(value))
    except OverflowError:  # a number of hundreds of digits
        return False


def _warn(line: str) -> None:
    say(f"WARNING: {line}", stream=sys.stderr, limit=ERROR_CHARACTERS)


def _start_progress(console: Console, title: str, first_step: int, num_steps: int) -> Progress:
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TextColumn("eta"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2)
    progress.add_task(title, total=num_steps, completed=first_step)
    progress.start()
    return progress


def _title(name: str) -> str:
    return printable(name, limit=_TITLE_CHARACTERS, one_line=True)


def _cell(value: str | float) -> str:
    text = value if isinstance(value, str) else short_number(value)
    return printable(text, limit=_CELL_CHARACTERS)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # sync: a phase ends when the GPU has ended it
