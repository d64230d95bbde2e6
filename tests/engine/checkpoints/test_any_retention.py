"""Whatever is saved, killed, set back and kept, in whatever order: the checkpoints that remain,
against a simple model.

A kill is an exception at some call that changes the disk, after which no call changes it: as with
SIGKILL, what would clean up does not.
"""

import builtins
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.retention import step_name, step_of
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.saving import SaveConfig
from tests.fuzzing import proved

METRIC = "valid/loss"
CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
RULES = st.builds(
    SaveConfig,
    keep=st.integers(1, 3),
    keep_every=st.integers(0, 4),
    keep_lowest=st.sampled_from(["", METRIC]),
    keep_highest=st.sampled_from(["", METRIC]),
    save_in_background=st.just(False),
)


class Killed(BaseException):
    """Ends everything, as SIGKILL would."""


@contextmanager
def killed_after(num_changes: int) -> Iterator[None]:
    """Let so many calls change the disk, and no more."""
    left = num_changes

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **named)

        return change

    opened = io.open

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        nonlocal left
        if set(mode) & set("wxa+"):
            left -= 1
            if left < 0:
                raise Killed
        return opened(file, mode, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(io, "open", open_counted)
        patch.setattr(builtins, "open", open_counted)
        yield


class Run(RuleBasedStateMachine):
    """The model: by step, the metrics of the checkpoints that are there; the newest, and whether a
    step was taken from it. Until then there is one before it, whatever the rules say."""

    @initialize(saving=RULES)
    def begin(self, saving):
        self.folder = Path(tempfile.mkdtemp())
        self.saving = saving
        self.there: dict[int, float | None] = {}
        self.newest = 0
        self.is_tried = False
        self.start_again()

    def start_again(self):
        """Start the run again: what it goes on from, and what it leaves there."""
        self.checkpointer = Checkpointer(
            directory=self.folder / "checkpoints",
            parallel=start_parallel(ParallelLayout(), seed=1),
            saving=self.saving,
            networks={},
            optimizers={},
        )
        progress = self.checkpointer.resume()
        self.step = progress["step"] if progress else 0
        if progress:
            value = progress["metrics"].get(METRIC)
            assert value == self.there[self.step] or value is self.there[self.step]
        assert self.step == self.newest
        self.is_tried = False
        self.there = self.kept()

    def kept(self) -> dict[int, float | None]:
        """Return what the rules keep of what is there, now that the newest is whole."""
        if not self.newest:
            return dict(self.there)
        older = sorted(step for step in self.there if step <= self.newest)
        num_last = self.saving.keep if self.is_tried else max(2, self.saving.keep)
        keep = set(older[-num_last:]) | {s for s in self.there if s > self.newest}
        if self.saving.keep_every:
            keep |= {step for step in older if step % self.saving.keep_every == 0}
        rated = {s: v for s in older if (v := self.there[s]) is not None and math.isfinite(v)}
        if rated and self.saving.keep_lowest:
            keep.add(max(s for s, v in rated.items() if v == min(rated.values())))
        if rated and self.saving.keep_highest:
            keep.add(max(s for s, v in rated.items() if v == max(rated.values())))
        return {step: value for step, value in self.there.items() if step in keep}

    @rule(
        gap=st.integers(1, 3),
        value=st.sampled_from([None, 0.0, 1.0, 1.0, 2.5, -3.0, math.inf, -math.inf]),
    )
    def save(self, gap, value):
        self.step += gap
        self.checkpointer.save(self.step, self.progress(value))
        self.there[self.step], self.newest, self.is_tried = value, self.step, False
        self.there = self.kept()

    @rule()
    def take_a_step(self):
        boundary = self.checkpointer.boundary(self.step + 1, is_last=False)
        assert boundary == (False, False)
        if self.newest:
            self.is_tried = True
            self.there = self.kept()

    @rule()
    def end_and_go_on(self):
        with self.checkpointer:
            pass
        self.is_tried = True
        self.there = self.kept()
        self.start_again()

    @rule(
        gap=st.integers(1, 3),
        value=st.sampled_from([None, 0.0, 1.0, 2.5]),
        num_changes=st.integers(0, 60),
    )
    def save_and_be_killed(self, gap, value, num_changes):
        before, step = dict(self.there), self.step + gap
        try:
            with killed_after(num_changes):
                self.checkpointer.save(step, self.progress(value))
        except Killed:
            pass
        latest = self.folder / "checkpoints" / "latest"
        names = step_of(latest.read_text()) if latest.exists() else 0
        is_whole = (self.folder / "checkpoints" / step_name(step) / "manifest.json").exists()
        if names == step:
            assert is_whole, "latest names what is not there"
            self.there[step], self.newest = value, step
        elif is_whole:
            # In its place, and not yet the newest: the next run comes to it again.
            self.there[step] = value
            assert names == self.newest
            if not self.newest:  # it is the only one, and is gone on from
                self.newest = step
        else:
            assert names == self.newest
            # One of that step, which a run that was set back left, may have been moved aside.
            assert {s for s in before if s != step} <= self.on_disk() | {step}
        self.start_again()

    @rule(saving=RULES)
    def go_on_by_other_rules(self, saving):
        self.saving = saving
        self.start_again()

    @precondition(lambda self: len(getattr(self, "there", ())) > 1)
    @rule(data=st.data())
    def set_back(self, data):
        self.newest = data.draw(st.sampled_from(sorted(self.there)))
        (self.folder / "checkpoints" / "latest").write_text(step_name(self.newest))
        self.start_again()

    def progress(self, value: float | None) -> dict[str, Any]:
        return {"metrics": {} if value is None else {METRIC: value}}

    def on_disk(self) -> set[int]:
        names = os.listdir(self.folder / "checkpoints")
        return {step for name in names if (step := step_of(name)) is not None}

    @invariant()
    def what_is_there_is_what_the_rules_keep(self):
        if not getattr(self, "newest", 0):
            return
        checkpoints = self.folder / "checkpoints"
        assert self.on_disk() == set(self.there)
        assert sorted(os.listdir(checkpoints)) == sorted([*map(step_name, self.there), "latest"])
        assert (checkpoints / "latest").read_text() == step_name(self.newest)

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestRun = Run.TestCase
TestRun.settings = settings(proved, stateful_step_count=12)
