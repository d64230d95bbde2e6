"""Runs that are struck, again and again, and started again end as if nothing had been: their
weights, optimizers, numbers and texts bit for bit, with nothing left beside them."""

import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.records import append_line
from benchmarks.timing import machine
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from engine.settings.waiting import WaitingConfig
from engine.stop import EXIT_STATUS, SIGNALS
from tests.chaos.killed_runs import (
    NOTHING,
    PATIENCE,
    Blow,
    Config,
    End,
    counts_in,
    differences,
    run,
    set_back,
    temporary_files,
)
from tests.tiny import EVERY_STEP, ppo_config, rm_config, sft_config

STAGES: dict[str, tuple[Callable[..., Config], dict[str, Any]]] = {
    # The last step has two saves, one after the other.
    "sft": (
        sft_config,
        {"dropout": 0.2, "epochs": 0.8, "save_every_epoch": True, "eval_every": 2},
    ),
    "rm": (
        rm_config,
        {
            "saving": SaveConfig(
                save_every=1, keep=1, keep_lowest="train/loss", save_in_background=False
            ),
            "eval_every": 1,
        },
    ),
    "ppo": (ppo_config, {"iterations": 3, "num_shown": 8, "show_every": 1}),
}
WORLDS = {
    "1": (1, ParallelLayout()),
    "dp2": (2, ParallelLayout()),
    "tp2": (2, ParallelLayout(tp=2)),
    "pp2": (2, ParallelLayout(pp=2)),
}
CASES = (
    *("sft-1", "ppo-1", "rm-1", "sft-dp2", "rm-tp2"),
    *("ppo-dp2", "ppo-tp2", "rm-dp2", "sft-tp2", "ppo-pp2"),
)
MOST_BLOWS = 4  # to one run, before it is left to come to its end
LEAVES = re.compile(r"stopped by a signal .*; the same command continues")
# Shorter than by default, for every halt waits as long; longer than any pause.
WAITING = WaitingConfig(join_seconds=20.0, silence_seconds=12.0)
# That of rank 0 keeps the store, by which the others would know of it.
HALTED = (
    re.compile(
        "rank 0 of 2 (gave no sign of life for .*, last seen in|did not come)"
        "|the first rank or torchrun keeps"
        "|found nobody to meet"
    ),
    re.compile("rank 1 of 2 (gave no sign of life for .*, last seen in|did not come)"),
)
HALT_SECONDS = 60.0  # in which those that wait for a halted rank have ended


@dataclasses.dataclass(kw_only=True)
class Case:
    """A stage on some ranks, and what is known of its runs."""

    name: str
    config: Config
    num_ranks: int
    whole: Path
    notes: Path
    counts: dict[str, list[dict[str, int]]]
    """By where a run begins, and by rank: how often a whole run comes to a line or a phase."""
    seconds: float
    """That a whole run takes."""
    draw: random.Random
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    phases: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def run(self, directory: Path, blow: Blow = NOTHING) -> End:
        config = dataclasses.replace(self.config, directory=directory)
        return run(config, self.notes, num_ranks=self.num_ranks, blow=blow)

    def blow(self, begins: str, *, is_first: bool) -> Blow:
        """Draw what befalls the run: half of all times a kill at a line, most often of a save."""
        if self.draw.random() < 0.5:
            return self._kill_at_line(begins, is_first)
        ranks = self._some_ranks()
        twice = ("twice",) if signal.SIGINT in SIGNALS else ()
        halt = ("halt",) if len(ranks) < self.num_ranks else ()  # somebody is left to notice it
        kind = self.draw.choice(("kill", "kill", "ask", "ask", *twice, "pause", *halt, "limit"))
        if kind == "limit":  # from metrics to the longest of a checkpoint's files
            num_bytes = int(10 ** self.draw.uniform(3.7, 5.6))
            return Blow(signals=(), ranks=ranks, file_bytes=num_bytes, others_live=PATIENCE)
        where: dict[str, Any] = self._some_moment(begins, ranks[0], is_first)
        if kind == "kill":
            return Blow(ranks=ranks, others_live=self.draw.choice((0.0, PATIENCE)), **where)
        if kind == "ask":
            return Blow(ranks=ranks, signals=(self.draw.choice(SIGNALS),), **where)
        if kind == "twice":
            return Blow(ranks=ranks, signals=(signal.SIGINT,) * 2, others_live=PATIENCE, **where)
        if kind == "halt":
            return Blow(ranks=ranks, signals=(signal.SIGSTOP,), others_live=HALT_SECONDS, **where)
        pause = self.draw.uniform(0.1, 1.5)
        return Blow(ranks=ranks, signals=(signal.SIGSTOP,), pause=pause, **where)

    def _kill_at_line(self, begins: str, is_first: bool) -> Blow:
        """A line that is as likely as any, one of the times that it is come to."""
        rank = self.draw.randrange(self.num_ranks)
        what = self.draw.choice(("save", "save", "save", "save", "start", "run"))
        counts = self.counts[begins][rank]
        if what == "save" and not self.config.saving.save_in_background:
            what = "start"  # is the whole of a save
        line = self.draw.choice(sorted(line for line in counts if line.startswith(f"{what} ")))
        return Blow(
            ranks=(rank,),
            line=line,
            nth=self._nth(counts[line], is_first),
            others_live=self.draw.choice((0.0, PATIENCE)),
            # Longer than a step of these networks.
            sync_seconds=self.draw.choice((0.0, 0.0, 0.01)),
        )

    def _some_ranks(self) -> tuple[int, ...]:
        everyone = tuple(range(self.num_ranks))
        return self.draw.choice((everyone, *((rank,) for rank in everyone)))

    def _some_moment(self, begins: str, rank: int, is_first: bool) -> dict[str, Any]:
        """A part of the run's life that is as likely as any, and a moment in it; or any moment."""
        if self.draw.random() < 0.3:
            return {"seconds": self.draw.uniform(0.0, self.seconds)}
        counts = self.counts[begins][rank]
        key = self.draw.choice(sorted(key for key in counts if key.startswith("phase ")))
        seconds = self.draw.choice((0.0, self.draw.uniform(0.0, 0.05), self.draw.uniform(0.0, 0.4)))
        phase = key.removeprefix("phase ")
        return {"phase": phase, "nth": self._nth(counts[key], is_first), "seconds": seconds}

    def _nth(self, count: int, is_first: bool) -> int:
        """After a death there are fewer steps to come."""
        return self.draw.randint(1, count if is_first else -(-count // 3))

    def record(self, path: str | None, seconds: float) -> None:
        """Say what was done and seen, in a line of JSON."""
        record = {
            "chaos": self.name,
            "blows": sum(self.kinds.values()),
            "by_kind": dict(sorted(self.kinds.items())),
            "by_phase": dict(sorted(self.phases.items())),
            **self.seen,
            "seconds": round(seconds, 1),
            **machine(torch.device("cpu")),
        }
        if path:
            append_line(Path(path), json.dumps(record))
        print(json.dumps(record))  # what a long run is read for (pytest -s)


def prepared(name: str, files: Path, folder: Path, seed: int = 0) -> Case:
    """Run a case undisturbed, from its beginning and set back by a step: with the same end."""
    stage, _, world = name.partition("-")
    make_config, changes = STAGES[stage]
    num_ranks, layout = WORLDS[world]
    changes = {"saving": EVERY_STEP, "layout": layout, "waiting": WAITING, **changes}
    config = make_config(files, folder / "whole", **changes)
    case = Case(
        name=name,
        config=config,
        num_ranks=num_ranks,
        whole=folder / "whole",
        notes=folder / "notes",
        counts={},
        seconds=0.0,
        draw=random.Random(f"{name} {seed}"),
    )
    for begins in ("whole", "set_back"):
        if begins == "set_back":
            set_back(case.whole, folder / begins)
        end = case.run(folder / begins)
        assert end.codes == [0] * num_ranks, end.output
        case.seconds = max(case.seconds, end.seconds)
        case.counts[begins] = [counts_in(case.notes, rank) for rank in range(num_ranks)]
    assert_same(folder / "set_back", case.whole)
    return case


def assert_same(directory: Path, whole: Path) -> None:
    assert differences(directory, whole) == []
    assert temporary_files(directory) == []


def assert_as_documented(end: End, blow: Blow) -> None:
    """See that a run ended as its documents say, whatever was done to it."""
    said = f"{blow}\n{end}"
    assert end.num_left == 0, said
    asks = len(blow.signals) == 1 and blow.signals[0] in SIGNALS
    # Signals are not yet noted, or no more; "": the process has only just begun.
    is_outside = bool({"", "start", "over"} & set(end.phases))
    if asks and not is_outside:
        assert end.ended_alone, said
        assert set(end.codes) in ({0}, {EXIT_STATUS}), said
        assert set(end.codes) == {0} or LEAVES.search(end.output), said
    elif blow.pause:
        assert set(end.codes) == {0}, said
    elif blow.kind == "halt":
        assert_halt_is_named(end, blow.ranks[0], said)
    elif blow.kind == "file limit":
        assert end.ended_alone, said
        assert set(end.codes) in ({0}, {2}), said
        # What it says is a file too, which may be full.
        is_silent = any(len(text.encode()) >= blow.file_bytes for text in end.outputs)
        assert set(end.codes) == {0} or is_silent or os.strerror(27) in end.output, said
    elif blow.kind == "SIGKILL":
        assert -signal.SIGKILL in end.codes or set(end.codes) == {0}, said
    if not is_outside and -signal.SIGKILL not in end.codes:
        assert "Traceback" not in end.output, said


def assert_halt_is_named(end: End, halted: int, said: str) -> None:
    """See that the other rank ended by itself, with the word which it missed, and where it was."""
    assert end.ended_alone, said
    other = end.codes[1 - halted]
    assert other in (0, 1, 2), said
    if other != 0:
        assert HALTED[halted].search(end.output), said


def strike_and_continue(case: Case, directory: Path, most: int) -> None:
    """Strike a run up to so often, from its beginning or set back, start it again each time, and at
    last have it come to its end."""
    begins = case.draw.choice(("whole", "whole", "set_back"))
    if begins == "set_back":
        set_back(case.whole, directory)
    done = 0  # steps that the run before this one had done
    for number in range(case.draw.randint(1, min(most, MOST_BLOWS))):
        blow = case.blow(begins, is_first=number == 0)
        end = case.run(directory, blow)
        assert_as_documented(end, blow)
        done = count_redone(case, end, done)
        if set(end.codes) == {0} and not blow.pause:  # it came too late
            break
        case.kinds[blow.kind] += 1
        case.phases[end.phases[blow.ranks[0]] or "before"] += 1
        case.seen["in a save"] += any(end.lines)
        if blow.kind == "SIGKILL" and len(blow.ranks) < case.num_ranks and blow.others_live != 0:
            case.seen["of one rank"] += 1
            case.seen["noticed in time"] += end.ended_alone
    end = case.run(directory)
    assert (end.codes, end.num_left) == ([0] * case.num_ranks, 0), f"{blow}\n{end.output}"
    count_redone(case, end, done)
    case.seen["ends_compared"] += 1
    assert_same(directory, case.whole)


def count_redone(case: Case, end: End, done: int) -> int:
    """Count the steps that were done again; return those that are done now."""
    if end.steps is None:
        return done
    first, now = end.steps
    redone = max(0, done - first)
    case.seen["steps_redone"] += redone
    case.seen["most_redone"] = max(case.seen["most_redone"], redone)
    # A save interval; and as many steps as are trained while the save before is being written.
    saving = case.config.saving
    assert redone <= saving.save_every * (2 if saving.save_in_background else 1)
    return now


@pytest.mark.chaos
@pytest.mark.parametrize("name", CASES)
def test_struck_runs_lose_nothing(
    name: str, tiny: Path, tmp_path: Path, pytestconfig: pytest.Config
):
    num_blows = pytestconfig.getoption("--chaos")
    wanted = (num_blows + len(CASES) - 1 - CASES.index(name)) // len(CASES)
    start = time.monotonic()
    case = prepared(name, tiny, tmp_path, pytestconfig.getoption("--chaos-seed"))
    try:
        while (number := sum(case.kinds.values())) < wanted:
            compared = case.seen["ends_compared"]
            assert compared <= 3 * wanted, "few blows come in time"
            strike_and_continue(case, tmp_path / f"run_{compared}", wanted - number)
            subprocess.run(["rm", "-rf", tmp_path / f"run_{compared}"], check=True)
    finally:
        case.record(pytestconfig.getoption("--record"), time.monotonic() - start)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Returns the folder of a disk of its own, of so many bytes; it may be told another size."""
    folder = tmp_path / "disk"

    def resized(num_bytes: int) -> Path:
        mounted = folder.is_mount()
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={num_bytes}"
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        )
        if tried.returncode:
            pytest.skip(f"no disk can be made: {tried.stderr.decode().strip()}")
        return folder

    yield resized
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["sft-1", "ppo-1", "rm-dp2"])
def test_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    name: str, disk: Callable[[int], Path], tiny: Path, tmp_path: Path, pytestconfig: pytest.Config
):
    disk(64 << 20)
    start = time.monotonic()
    case = prepared(name, tiny, tmp_path, pytestconfig.getoption("--chaos-seed"))
    most = sum(path.stat().st_size for path in case.whole.rglob("*") if path.is_file())
    while sum(case.kinds.values()) < max(1, pytestconfig.getoption("--chaos") // 30):
        directory = disk(64 << 20) / f"run_{case.seen['ends_compared']}"
        directory.mkdir()
        disk(4096 * int(10 ** case.draw.uniform(0.3, 3.0)) % most + 8192)
        end = case.run(directory)
        if set(end.codes) != {0}:
            assert (set(end.codes), end.num_left) == ({2}, 0), end
            assert re.search("error: .*No space left on device", end.output), end
            assert "Traceback" not in end.output, end
            case.kinds["full disk"] += 1
            case.phases[end.phases[0]] += 1
        disk(64 << 20)
        assert set(case.run(directory).codes) == {0}
        case.seen["ends_compared"] += 1
        assert_same(directory, case.whole)
        subprocess.run(["rm", "-rf", directory], check=True)
    case.record(pytestconfig.getoption("--record"), time.monotonic() - start)


@pytest.mark.slow
def test_rank_does_not_wait_for_ever_for_one_that_was_killed_in_the_last_save(
    tiny: Path, tmp_path: Path
):
    case = prepared("sft-dp2", tiny, tmp_path)
    counts = case.counts["whole"][1]
    line = max(line for line in counts if line.startswith("save tensor_file.py"))
    blow = Blow(ranks=(1,), line=line, nth=counts[line], others_live=110.0)
    end = case.run(tmp_path / "run", blow)
    assert (end.codes, end.ended_alone) == ([1, -signal.SIGKILL], True)
    assert end.lines[1] == line
    assert case.run(tmp_path / "run").codes == [0, 0]
    assert_same(tmp_path / "run", case.whole)
