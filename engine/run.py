"""The frame of a run: its ranks, its tokenizer, its folder with the configuration it was resolved
to."""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from engine import stop
from engine.claim import LOCK, claim, holding_claims
from engine.containers.sources import sources_of
from engine.data.account import ACCOUNT, Account
from engine.data.examples import LengthReport
from engine.data.limits import Limits
from engine.data.pretraining import TokenFile, make_token_file, read_token_file
from engine.data.records import ReadReport
from engine.data.tokenizer import Tokenizer, make_tokenizer
from engine.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from engine.data.tokenizer_trial import try_tokenizer
from engine.errors import UserError, named
from engine.files import (
    MAX_SHOWN_PATH,
    check_replaceable,
    check_writable,
    clear_partials,
    hub_name,
    link_to_nothing,
    write_object,
)
from engine.printable import say
from engine.ranks.device import make_deterministic
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.same_folder import check_same_folder
from engine.ranks.signs import keep_stacks_in
from engine.ranks.start import start_parallel
from engine.settings.command_line import as_options
from engine.settings.saved import changed_fields, save_config

# What a run may change when it goes on: where and how fast it runs, how long, what it writes. Any
# other change would make it neither the old run nor the new one.
MANNER = (
    *("directory", "layout", "critic_layout", "generation_layout", "residency", "alarms"),
    *("eval_every", "saving", "num_shown", "show_every"),
    *("num_slots", "prefill_tokens", "block_size", "cache_fraction", "cache_gib", "steps_per_sync"),
    *("cuda_graphs", "micro_batch_tokens", "recompute", "gradient_accumulation_fusion"),
    *("share_prompts", "deterministic", "recheck_every", "compare_every", "spikes", "waiting"),
    *("max_skipped_steps", "accept_changed"),
)
"""Settings of where and how fast a run goes, and of what it writes beside its result."""
_MAY_CHANGE = (
    *MANNER,
    *("epochs", "iterations", "skip_bad_lines"),
    "tokenizer",  # engine/identity/ knows which one it was
)
MARK = "newest_checkpoint"
"""A file in a run's folder, outside of checkpoints/, that says that there were some."""
_LATE_FILES = (MARK, "checkpoints/selected", "selected.json", "memory.txt")
_LATE_FOLDERS = ("checkpoints", "skipped")
Changed = dict[str, tuple[Any, Any]]
"""Fields by their dotted names: (as a run has them, as they are given now)."""
_STEP = re.compile(r"step_\d{8,12}", re.ASCII)  # the name of a checkpoint that a run goes on from


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage starts from."""

    directory: Path
    parallel: Parallel
    tokenizer: Tokenizer
    account: Account = field(default_factory=Account)
    """What was read of the files of data."""

    @property
    def _settings(self) -> Path:
        return self.directory / "config.json"

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.directory / "checkpoints"

    @property
    def mark(self) -> Path:
        """The file that names the newest of them from without."""
        return self.directory / MARK

    def count(
        self,
        name: str,
        found: ReadReport | LengthReport,
        *,
        part: str = "examples",
        limits: Limits | None = None,
    ) -> None:
        """Note how reading an option's file went, or what of a part of it was within limits; all
        ranks call together, each for itself. UserError on one whose file is another than the first
        rank's: they would train together on batches of neither.
        """
        if isinstance(found, LengthReport):
            self.account.add_lengths(name, found, part, limits)
            return
        if said_by_first_rank(lambda: found.xxh3_128) != found.xxh3_128:
            raise UserError(
                f"--{name.replace('_', '-')}: rank {dist.get_rank()} reads another file there "
                "than the first rank; have all nodes see the same files"
            )
        self.account.add_read(name, found)

    def token_file(self, source: Path, *, skip_bad_lines: bool, fields: str = "auto") -> TokenFile:
        """Return the tokens of a file of pretraining text, kept in the run's folder; all ranks call
        together.

        The first rank makes them, on all cores of its node; the others wait and map them.
        """

        def make() -> str:
            folder = self.directory / "tokens"
            path = make_token_file(
                source, self.tokenizer, folder, skip_bad_lines=skip_bad_lines, fields=fields
            )
            return str(path)

        return read_token_file(Path(said_by_first_rank(make)), source)

    def is_asked_to_stop(self) -> bool:
        """Return whether a signal has reached any rank: the same answer on all, who call together.

        One all-reduce of one number. Signals reach the ranks at different steps, and a checkpoint
        is written by all of them.
        """
        flag = torch.tensor(float(stop.is_noted()), device=self.parallel.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())  # sync: as the step's metrics, which were read just before

    def leave(self, step: int) -> NoReturn:
        """End the process with stop.EXIT_STATUS; the checkpoint of `step` has been written."""
        stop.leave(f"at step {step}", is_writer=self.parallel.is_writer)

    def leave_if_asked(self) -> None:
        """End the process where a signal has reached any rank since the stage began, with nothing
        to save yet; all ranks call together."""
        if self.is_asked_to_stop():
            stop.leave("before its first step", is_writer=self.parallel.is_writer)

    def write_settings(self, config: Any, known: Collection[str] = ()) -> None:
        """Write config.json, the tokenizer and what was read of the data into the run's folder.

        The stages do so once everything is loaded: a mistake of the user's so leaves no folder, and
        changes none that an earlier run has written. UserError as check_settings.
        """
        self.check_settings(config, known)
        if self.parallel.is_writer:
            self.tokenizer.save(self.directory / "tokenizer")
            if hasattr(config, "accept_changed"):  # once, and not for whoever starts from it
                config = dataclasses.replace(config, accept_changed=())
            save_config(config, self._settings)
            write_object(self.directory / ACCOUNT, self.account.files)

    def check_settings(self, config: Any, known: Collection[str] = ()) -> None:
        """Raise UserError, on every rank, where the folder's checkpoints are of a run with other
        settings.

        known: the dotted names of paths that may be others, for what is there is compared.
        """

        def compare() -> str:
            found = settings_among(self.saved_changes(config), known)
            if not found:
                return ""
            options = as_options(config, {name: saved for name, (saved, _) in found.items()})
            raise UserError(
                f"{self.settings_in_words(found)}; give another --directory,\nchange "
                f"{self._settings} to go on with the new ones, or go on with those it had by "
                f"{options}"
            )

        said_by_first_rank(compare)

    def saved_changes(self, config: Any) -> Changed:
        """Return changed_fields of what the run was started with, on the rank that asks; nothing
        where it has no checkpoint, or has not kept it. UserError, with the way out of it, where
        that is no file of settings."""
        if not has_begun(self.directory) or not os.path.lexists(self._settings):
            return {}
        try:
            return changed_fields(config, self._settings)
        except UserError as error:
            raise UserError(
                f"{error}; put it back, or remove it: it is written anew then, of the settings "
                "that are given"
            ) from None

    def settings_in_words(self, found: Changed) -> str:
        """Return that the run has other settings, and which."""
        words = ((n, *(named(v, MAX_SHOWN_PATH) for v in both)) for n, both in found.items())
        said = "; ".join(f"{name} {saved}, not {now}" for name, saved, now in words)
        return f"{self.directory} is a run with {said}"


def settings_among(changed: Changed, known: Collection[str] = ()) -> Changed:
    """Return those of a run's changed fields that it may not change; known: as check_settings."""
    return {
        name: both
        for name, both in changed.items()
        if name not in known and not set(name.split(".")) & set(_MAY_CHANGE)
    }


def changed_setting(
    config: Any,
    path: Path,
    *,
    may_change: Collection[str] = _MAY_CHANGE,
    passing_over: Collection[str] = (),
) -> str | None:
    """Return "NAME OLD, not NEW" of a setting that makes this another run than the one whose
    settings save_config wrote to `path`; None where there is none.

    may_change: fields, at any depth, that may have another value; passing_over: dotted names that
    may have another one, where both have one.
    """
    for name, (saved, now) in changed_fields(config, path).items():
        is_other = name in passing_over and saved is not None and now is not None
        if not is_other and not set(name.split(".")) & set(may_change):
            return f"{name} {saved}, not {now}"
    return None


@contextlib.contextmanager
def stage() -> Iterator[None]:
    """What holds around a stage: signals are noted, and its folder is claimed to its end. Also a
    decorator."""
    with stop.noting_signals(), holding_claims():
        yield


def join_ranks(config: Any) -> Parallel:
    """Join the other ranks of a stage, which all have the same config, or UserError; before that
    make this process deterministic, where it is to be, so that NCCL knows it from its first message
    on."""
    if config.numerics.deterministic:
        make_deterministic()
    return start_parallel(config.layout, config.seed, config.waiting, config)


def start_run(*, directory: Path, parallel: Parallel, tokenizer: Path) -> Run:
    """Load the tokenizer on ranks that have joined, and claim the run's folder; all leave where a
    signal has reached one.

    tokenizer may be a file, a folder, or an earlier run, whose tokenizer it then is; a run that has
    checkpoints keeps its own. UserError, on every rank, where another run writes into the folder,
    or nobody can.
    """

    def find() -> Path:
        if keeps_tokenizer(directory):
            return directory / "tokenizer"
        return tokenizer_beside(tokenizer)

    loaded = load_shared_tokenizer(find)
    claim_for_all(directory, "tokens", "tokenizer")
    keep_stacks_in(directory)
    run = Run(directory=directory, parallel=parallel, tokenizer=loaded)
    run.leave_if_asked()
    return run


def tokenizer_beside(path: Path) -> Path:
    """Return the tokenizer that a path means: that of a run, also where one of its checkpoints or a
    network in one is named, or the path itself."""
    is_within = any((path / name).exists() for name in ("manifest.json", "network.json"))
    for run in (path, *(path.absolute().parents[1:3] if is_within else ())):
        if (run / "tokenizer").exists():
            return run / "tokenizer"
    return path


def claim_for_all(directory: Path, *inner: str) -> None:
    """Claim a folder, on the first rank for all, who call together.

    What killed runs were writing there, and into the named folders in it, is cleared. Checkpoints
    clear their own. What is first written after steps is seen to be writable now. UserError, on
    every rank, where it is another folder on some.
    """

    def take() -> str:
        claim(directory)
        for folder in (directory, *(directory / name for name in inner)):
            clear_partials(folder)
        for name in _LATE_FILES:
            check_replaceable(directory / name)
        for folder in (directory / name for name in _LATE_FOLDERS):
            if os.path.lexists(folder):
                check_writable(folder)
        return ""

    said_by_first_rank(take)
    check_same_folder(directory, directory / LOCK, "directory")


def load_shared_tokenizer(find: Callable[[], Path]) -> Tokenizer:
    """Return the tokenizer at the path that `find` returns on the first rank, the same on all, who
    call together; the first rank alone tries it. Raises UserError."""
    tried: list[TokenizerFiles] = []

    def load() -> str:
        files = read_tokenizer_files(find())
        try_tokenizer(files)
        tried.append(files)
        return json.dumps([str(files.path), files.digest()])

    path, digest = json.loads(said_by_first_rank(load))
    files = tried[0] if tried else read_tokenizer_files(Path(path))
    if files.digest() != digest:
        raise UserError(f"{path}: not the tokenizer here that it is on the first rank")
    tokenizer = make_tokenizer(files)
    if tried:
        for note in tokenizer.notes:
            say(f"WARNING: {path}: {note}", stream=sys.stderr)
    return tokenizer


def has_begun(directory: Path) -> bool:
    """Return whether a run has a checkpoint to go on from, as this rank sees it; UserError where it
    had some, and none is there."""
    checkpoints, mark = directory / "checkpoints", directory / MARK
    if os.path.lexists(checkpoints / "latest"):
        return True
    steps = (path for path in checkpoints.glob("step_*") if _STEP.fullmatch(path.name))
    if any(path.is_dir() for path in steps):
        return True
    check_replaceable(mark)
    if os.path.lexists(mark):
        raise UserError(
            f"{checkpoints} has no checkpoint, and {mark} says that there were some: put them back "
            "(is their disk there?), begin in a new directory, or remove that file to begin anew"
        )
    return False


def keeps_tokenizer(directory: Path) -> bool:
    """Return whether a run goes on with its own copy of its tokenizer, as this rank sees it."""
    return has_begun(directory) and (directory / "tokenizer").exists()


def tokenizer_path(
    tokenizer: Path | None,
    init_from: Path | None,
    directory: Path | None = None,
    option: str = "init-from",
) -> Path:
    """Return where a stage's tokenizer is: its own option's, or the run it starts from; or the
    folder of a run that goes on, and keeps its own.

    option: the one that names the run it starts from.
    """
    if directory is not None and said_by_first_rank(
        lambda: "kept" if keeps_tokenizer(directory) else ""
    ):
        return directory
    if tokenizer is None and init_from is None:
        raise UserError(
            "--tokenizer is required where no --init-from brings one; recipes/tokenizer.py makes "
            "one of your own texts"
        )
    return require_path(tokenizer or init_from, option if tokenizer is None else "tokenizer")


def require_path(path: Path | None, option: str) -> Path:
    """Return the path, or raise UserError naming the option when it is missing or the first rank,
    for all who call together, sees nothing there."""
    if path is None:
        raise UserError(f"--{option} is required")
    if not said_by_first_rank(lambda: "there" if path.exists() else ""):
        why = link_to_nothing(path) or f": no such file or folder{hub_name(path)}"
        raise UserError(f"--{option} {path}{why}")
    return path


def require_data(path: Path | None, option: str) -> None:
    """Raise UserError naming an option of data where its path is missing, or names nothing that the
    first rank sees; all call together."""
    if path is None:
        raise UserError(f"--{option} is required")
    try:
        said_by_first_rank(lambda: "there" if sources_of(path) else "")
    except UserError as error:
        raise UserError(f"--{option} {error}") from None
