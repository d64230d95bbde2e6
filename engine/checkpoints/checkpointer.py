"""Save and resume the networks of a run; any layout reads what any other wrote.

    RUN/checkpoints/latest               the name of the newest checkpoint
    RUN/checkpoints/selected             the name of the one that the run is known by, if not latest
    RUN/checkpoints/step_00000100/
        manifest.json                    every other file's bytes and checksum; written last
        progress.json                    step, KL coefficient, ...: what a stage resumes from
        identity.json                    what the run was made from (engine/identity/)
        policy/                          one network
            network.json                 its kind, size and tokenizer
            tensors.json                 its tensors, and where their pieces lie
            weights-00003.safetensors    rank 3's share of the weights
            optimizer-00003.safetensors  and of Adam's masters and moments
        critic/  ema/                    ...
    RUN/checkpoints/epoch_0003/          weights alone, which are kept

A checkpoint is written beside its place and renamed, and `latest` follows last: a run killed while
saving resumes from the one before. It holds numbers and text alone: nothing in it can run code.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from engine import stop
from engine.checkpoints.draft import Draft
from engine.checkpoints.found import check_description, progress_in, read_network
from engine.checkpoints.manifest import Damage
from engine.checkpoints.pointers import (
    newest_in_words,
    no_pointer,
    point,
    pointed_checkpoint,
    steps_in,
    up_to,
)
from engine.checkpoints.reading import read_owned, read_shared
from engine.checkpoints.recorded import check_counts
from engine.checkpoints.retention import Retention, step_name, step_of, superseded
from engine.checkpoints.saving import Saver, clear_leftovers, discard
from engine.checkpoints.shards import average_parts, optimizer_parts, weight_parts
from engine.checkpoints.weights import not_finite_message
from engine.checkpoints.whole import newest_whole, warn
from engine.errors import UserError
from engine.ranks import failure
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.signs import in_phase
from engine.settings.saving import SaveConfig
from engine.training.copies import check_copies
from engine.training.ema import EMA
from engine.training.finite import check_finite
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from engine.training.skipped import SkippedSteps, naming_the_last_good

# Seconds that a run which ends by an error waits for the save in flight, our choice: a rank that is
# gone never ends its part of it.
_LAST_WAIT = 60.0
_LOOK = 1.0  # seconds between two looks at whether all ranks are still there; our choice


class Boundary(NamedTuple):
    """What all ranks do now that a step is done."""

    saves: bool
    leaves: bool


@dataclasses.dataclass(kw_only=True)
class Checkpointer:
    """The checkpoints of one run: which networks and numbers they hold, where, when they are due,
    and which are kept. `with checkpointer:` around training waits for the last to be written."""

    directory: Path
    parallel: Parallel
    networks: dict[str, Network]
    optimizers: dict[str, Optimizer]
    ema: EMA | None = None
    mark: Path | None = None
    """A file outside of the directory that names the newest too: should all of it be lost."""
    saving: SaveConfig = dataclasses.field(default_factory=SaveConfig)
    tokenizer_fingerprint: str = ""
    iterations: SkippedSteps | None = None
    """Those of PPO that were skipped without a step of any optimizer."""
    goes_back: bool = False
    """Keep what go_back() loads, beside what the saving keeps."""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """What each checkpoint of a step holds besides, by the names of its files."""

    def __post_init__(self) -> None:
        self._saver = Saver(self.parallel)
        self._retention = Retention(
            last=self.saving.keep,
            every=self.saving.keep_every,
            lowest=self.saving.keep_lowest,
            highest=self.saving.keep_highest,
            newest_of=self.saving.save_every if self.goes_back else 0,
        )
        # Whether the weights of the newest are good, only a step from there shows.
        self._while_untried = dataclasses.replace(self._retention, last=max(2, self.saving.keep))
        self._saved_at = time.monotonic()
        self._damaged: set[int] = set()
        self._missed: set[str] = set()  # metrics of which was said that not every step has them
        self._untried: int | None = None  # the checkpoint that no step was taken from yet

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.finish()
            self._discard_tried()
            return
        failure.await_verdict(exception[0])  # where another rank is gone, no save becomes whole
        # What ends the run is said, not what became of the save; but that may still become whole.
        try:
            if not self._saver.finish(_LAST_WAIT):
                warn("the last checkpoint was still being written when the run ended")
        except Exception as error:
            warn(f"the last checkpoint was not written: {error}")

    def boundary(self, step: int, *, is_last: bool) -> Boundary:
        """Return whether to save now that so many steps are done, and whether to leave for a
        signal: the same on all ranks, who call together.

        One all-reduce of three numbers. Signals reach the ranks at different steps, only the first
        rank looks at the clock, and each learns by itself when a save has failed. Raises UserError
        where one has.
        """
        minutes = (time.monotonic() - self._saved_at) / 60
        is_time = 0 < self.saving.save_every_minutes <= minutes and self.parallel.is_writer
        noted = [stop.is_noted(), is_time, self._saver.has_failed]
        flags = torch.tensor([float(fact) for fact in noted], device=self.parallel.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        # sync: as the step's metrics, which were read just before
        is_asked, is_time, has_failed = (bool(flag) for flag in flags.tolist())
        if has_failed:
            self.finish()
        if self._saver.is_over(0.0):
            self._discard_tried()
        saves = is_last or is_asked or is_time or self._is_due(step)
        return Boundary(saves, is_asked and not is_last)

    def save(self, step: int, progress: dict[str, Any]) -> Path:
        """Take every rank's part of checkpoint `step`, with the progress, and have it written;
        return its folder, which is there once finish() returns.

        UserError, and nothing written, where weights are not finite, or ranks that compare theirs
        differ.
        """
        self._check_finite()
        for role, network in self.networks.items():
            if network.numerics.compare_every:
                check_copies(network, f"before the checkpoint of step {step}", role)
        self._saved_at = time.monotonic()
        missing = self._retention.missing(progress.get("metrics", {}))
        for metric in sorted(missing.keys() - self._missed):
            warn(missing[metric])
        self._missed |= missing.keys()
        name, is_in_doubt = step_name(step), self._is_in_doubt()
        self._untried = step

        def publish() -> None:
            point(self.directory / "latest", name)
            if self.mark is not None:
                point(self.mark, name)
            if not is_in_doubt:
                self._discard_superseded(step, self._while_untried)

        draft = Draft(folder=self.directory / name, step=step, published=publish)
        draft.texts |= self.texts
        draft.texts["progress.json"] = json.dumps({"step": step, **progress}, indent=1)
        for role, network in self.networks.items():
            optimizer = self.optimizers.get(role)
            draft.add_network(role, network, optimizer, self.tokenizer_fingerprint)
        if self.ema is not None:
            draft.add_average("ema", self.ema, self.tokenizer_fingerprint)
        return self._start(draft)

    def save_weights(self, name: str) -> None:
        """Have checkpoint `name` written with the networks' weights alone; it is kept, and not
        resumed from. UserError, and nothing written, where weights are not finite."""
        self._check_finite()
        draft = Draft(folder=self.directory / name, step=None)
        for role, network in self.networks.items():
            draft.add_network(role, network, None, self.tokenizer_fingerprint)
        self._start(draft)

    def save_beside(self, draft: Draft, roles: Sequence[str]) -> None:
        """Write a draft with the weights of some networks, finite or not; it is no checkpoint of
        the run, and is on the disk when this returns. UserError where it cannot be written."""
        for role in roles:
            draft.add_network(role, self.networks[role], None, self.tokenizer_fingerprint)
        self._start(draft)
        self.finish()

    def finish(self) -> None:
        """Wait until what was saved is on the disk; raises UserError, on all ranks alike, where it
        could not be written. All ranks call together.

        They look together, a second at a time. So a rank that is gone, whose part never ends, fails
        the others' collective; and none leaves, the store perhaps with it, before all know.
        """
        is_over = torch.zeros((), device=self.parallel.device)
        with in_phase("waiting for a save", is_bounded=False):
            while not is_over.item():  # sync: once a save, and once a second of waiting for it
                is_over.fill_(self._saver.is_over(_LOOK))
                dist.all_reduce(is_over, dist.ReduceOp.MIN)
        self._saver.finish()

    def newest(self) -> str:
        """Return the path of the newest checkpoint, once it is on the disk, with the names of the
        older ones beside it; "" where there is none. All ranks call together."""
        self.finish()
        return said_by_first_rank(lambda: newest_in_words(self.directory))

    def named_after(self, where: str) -> AbstractContextManager[None]:
        """Run a block whose FloatingPointError becomes a UserError that says how far the run is, in
        `where`, and names the newest checkpoint; all ranks raise it alike."""
        return naming_the_last_good(where, self.newest)

    def select(self, name: str) -> None:
        """Make `name` the checkpoint that whoever is given the run's folder loads, in place of the
        newest."""
        self.finish()
        if self.parallel.is_writer:
            point(self.directory / "selected", name)
        dist.barrier()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint that the first rank sees into the networks and
        optimizers; return its progress, None if there is none.

        Raises UserError where none is whole, or the newest is not and strict is set.
        """
        looked = json.loads(said_by_first_rank(self._look))
        return None if looked is None else self._load(looked)

    def go_back(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into a run that is under way, as resume() does; return
        its progress, None if there is none. All ranks call together.

        With save_every it is the newest that this divides, if one is there. So a run that a signal
        had stopped meanwhile, and had save, goes back as far as one that none had.
        """
        self.finish()
        for network in self.networks.values():
            network.settle()
        looked = json.loads(said_by_first_rank(self._look))
        if looked is None:
            return None
        due = [name for name in looked["names"] if self._is_due(step_of(name))]
        if due:
            looked = {"names": due, "damage": ""}
        return self._load(looked)

    def _is_due(self, step: int | None) -> bool:
        every = self.saving.save_every
        return every > 0 and step is not None and step % every == 0

    def _load(self, looked: dict[str, Any]) -> dict[str, Any]:
        """Load the first whole one of the checkpoints that _look has named."""
        candidates = [self.directory / name for name in looked["names"]]
        folder, damage = newest_whole(candidates, damage=looked["damage"])
        if folder is None or (damage and self.saving.strict):
            advice = f"{folder} is whole: leave out --strict" if folder else "none other is whole"
            raise UserError(f"{damage}; {advice}, or begin in a new directory")
        if damage:
            warn(f"{damage}\nWARNING: the run goes on from {folder}, the newest whole checkpoint")
            passed = candidates[: candidates.index(folder)]
            self._damaged = {step for c in passed if (step := step_of(c.name)) is not None}
        progress = json.loads(said_by_first_rank(lambda: json.dumps(progress_in(folder))))
        for role, network in self.networks.items():
            self._load_network(folder / role, network, self.optimizers.get(role))
        if self.ema is not None:
            self._load_ema(folder / "ema")
        self._untried = progress["step"]
        if not damage:
            is_in_doubt = self._is_in_doubt(progress)
            said_by_first_rank(lambda: self._tidy(progress["step"], is_in_doubt=is_in_doubt))
        return progress

    def _is_in_doubt(self, progress: Mapping[str, Any] | None = None) -> bool:
        """Return whether the last step or iteration was skipped: finite weights may be why, and an
        older checkpoint, which then stays, the last good one. progress: of a checkpoint that is
        being loaded, whose iterations the stage has yet to load."""
        optimizers = self.optimizers.values()
        if any(o.skipped.since_taken or o.spikes.spiked.since_taken for o in optimizers):
            return True
        if progress is not None:
            return progress.get("skipped_rollouts", {}).get("in_a_row", 0) > 0
        return self.iterations is not None and self.iterations.since_taken > 0

    def _discard_tried(self) -> None:
        """Discard what only stayed until a step was taken from the newest checkpoint, if one was;
        or now that the run is over. The newest is whole."""
        if self._untried is None or self._is_in_doubt():
            return
        newest, self._untried = self._untried, None
        if self.parallel.is_writer:
            with contextlib.suppress(OSError):  # the next save says so
                self._discard_superseded(newest, self._retention)

    def _tidy(self, newest: int, *, is_in_doubt: bool) -> str:
        """Do what a killed run had yet to do when checkpoint `newest` was whole: a run that is
        resumed at its end saves no more, and would leave it so."""
        if not os.path.lexists(self.directory / "latest"):
            point(self.directory / "latest", step_name(newest))
        try:
            if not is_in_doubt:
                self._discard_superseded(newest, self._while_untried)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from None
        return ""

    def _discard_superseded(self, newest: int, retention: Retention) -> None:
        for old in superseded(self.directory, newest, retention, damaged=self._damaged):
            discard(old)

    def _look(self) -> str:
        """Return the names of the checkpoints to resume from, the best first, and what is wrong
        with `latest`; put in order what a killed run was about to change."""
        clear_leftovers(self.directory)
        latest, steps = self.directory / "latest", steps_in(self.directory)
        names = [folder.name for folder in steps]
        if not os.path.lexists(latest):
            if len(steps) == 1:  # the first of a run that was killed before it could write `latest`
                return json.dumps({"names": names, "damage": ""})
            if steps:
                raise UserError(no_pointer(latest, "gone", names))
            return "null"
        if latest.is_dir():  # nor could the next save replace it
            raise UserError(no_pointer(latest, "a folder, no checkpoint's name", names))
        damage = ""
        try:
            first = pointed_checkpoint(latest)
            if step_of(first.name) is None:
                raise UserError(f"{latest}: names {first.name}, which holds weights alone")
            names = [folder.name for folder in up_to(first, steps)]
        except UserError as error:
            damage = str(error)
        if not names:
            raise UserError(f"{damage}; no checkpoint is beside it: begin in a new directory")
        return json.dumps({"names": names, "damage": damage})

    def _check_finite(self) -> None:
        for role, network in self.networks.items():
            shadows = self.ema.shadows if self.ema and self.ema.optimizer.network is network else ()
            check_finite(
                network,
                f"the weights of the {role} are not finite, and are not saved: the run goes no "
                f"further. What was saved before in {self.directory} stays; lower the learning "
                "rate, or use bf16 or fp32 in place of fp16",
                shadows,
            )

    def _start(self, draft: Draft) -> Path:
        self.finish()
        self._saver.start(draft)
        if not self.saving.save_in_background:
            self.finish()
        return draft.folder

    def _load_network(self, folder: Path, network: Network, optimizer: Optimizer | None) -> None:
        found = read_network(folder)
        if found.kind != network.kind:
            raise Damage(f"{folder}: a {found.kind} network, where a {network.kind} one was saved")
        check_description(found, network, self.tokenizer_fingerprint)
        read_shared(weight_parts(network), folder, found.index, network.parallel)
        network.mark_changed()
        check_finite(network, not_finite_message(folder))  # fp32 masters will lie over the weights
        if optimizer is not None:
            state = optimizer_parts(optimizer)
            read_owned(state, folder, found.index)
            check_finite(network, not_finite_message(folder), [part.tensor for part in state])
            counts = found.index.counts
            try:
                check_counts(counts, is_scaled=network.dtype is torch.float16)
            except ValueError as error:
                raise Damage(f"{folder}: no counts of an optimizer: {error}") from None
            optimizer.load_counts(counts)

    def _load_ema(self, folder: Path) -> None:
        assert self.ema is not None
        network, found = self.ema.optimizer.network, read_network(folder)
        check_description(found, network, self.tokenizer_fingerprint)
        read_owned(average_parts(self.ema), folder, found.index)
        check_finite(network, not_finite_message(folder), self.ema.shadows)
