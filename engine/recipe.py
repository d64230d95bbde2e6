"""From a command line to a stage: the whole body of a recipe."""

from engine.stop import INTERRUPTED, noting_signals, pass_over_interrupts  # isort: split

import contextlib
import dataclasses
import errno
import importlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from engine.environment import (
    check_launch,
    is_under_torchrun,
    prepare_libraries,
    quiet_libraries,
    rank_of_environment,
    tell_torchrun,
    world_size_of_environment,
)
from engine.errors import UserError, quoted
from engine.guide.stage_words import ending, newest_step, recipe_of_process
from engine.planning.sizes import StageConfig
from engine.printable import (
    ERROR_CHARACTERS,
    TRACEBACK_CHARACTERS,
    printable,
    say,
)
from engine.process.family import watching_launcher
from engine.process.streams import make_streams_last
from engine.settings.command_line import parse_config
from engine.settings.saved import load_config
from engine.settings.waiting import WaitingConfig

_Config = TypeVar("_Config")
_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory")  # in words of the linker
_NOT_THERE = (errno.EROFS, errno.EACCES, errno.EPERM)

_MAX_DIGITS = 9  # of a number of GPUs


def run_stage(
    train: Callable[[_Config], object] | str,
    default: _Config,
    arguments: Sequence[str] | None = None,
    *,
    num_gpus: int | None = None,
    has_dry_run: bool = True,
) -> None:
    """Parse the command line over `default` and call `train(config)`: the whole body of a recipe.

    `train` may be the function's full name, such as "engine.sft.train", for this file must not
    reach torch by an import. Those seconds --help and a wrong option need not wait for, and signals
    are noted in them already (engine/stop.py).

    Field `data.skip_bad_lines` is the option `--data.skip-bad-lines`. A UserError, and an unknown
    option is one, prints `error: ...` on stderr without a traceback and exits with status 2. Where
    one rank fails, all end (engine/ranks/failure.py).
    `arguments` replaces sys.argv[1:]. `--config` reads a saved config and lays the other options
    over it. `--dry-run` checks the stage (engine/dry_run/dry_run.py) instead of running it: on as
    many GPUs as it names, or on `num_gpus`, those of the recipe's launch.
    """
    _make_streams_safe()
    is_expected = True  # by the other ranks
    try:
        check_launch()
        if not has_dry_run:
            config = parse_config(default, arguments)
            _call(train, config)
            return
        job = parse_config(_stage_job(default), arguments)
        if job.config is not None:
            path = job.config / "config.json" if os.path.isdir(job.config) else job.config
            saved = load_config(type(default), path)
            job = parse_config(_stage_job(saved), arguments)
            kept_origins = importlib.import_module("engine.identity.kept_origins")
            kept_origins.refuse_gone_origins(job.stage, saved, path.parent)
        if job.dry_run is None:
            with noting_signals():
                _call_stage(train, job.stage)
        elif rank_of_environment() == 0:
            is_expected = False
            quiet_libraries()
            dry_run = importlib.import_module("engine.dry_run.dry_run").dry_run
            dry_run(job.stage, _named_gpus(job.dry_run), usual=num_gpus)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else _said_by_system(error)
        if said is not None:
            message = printable(f"error: {said}", limit=ERROR_CHARACTERS)
            _print_once(message)
            tell_torchrun(message)
            _tell_others(message, 2, is_expected=is_expected)
            sys.exit(2)
        _await_verdict(error)
        text = _traceback(error)
        last_line = printable(text.rpartition("\n")[2], limit=ERROR_CHARACTERS)
        tell_torchrun(last_line)
        _tell_others(last_line, 1, text, is_expected=is_expected)
        raise


def _traceback(error: BaseException) -> str:
    """Return a traceback with its error, whose words may be those of a file: printable."""
    text = "".join(traceback.format_exception(error)).rstrip()
    return printable(text, limit=TRACEBACK_CHARACTERS)


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Print what ends the process, as Python would; but printable, and nothing of Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        say(_traceback(error), stream=sys.stderr)


def _make_streams_safe() -> None:
    """Have what Python and tyro print by themselves be printable too, in any encoding."""
    make_streams_last()
    if sys.excepthook in (sys.__excepthook__, pass_over_interrupts):  # else a debugger has another
        sys.excepthook = _show_uncaught


def _said_by_system(error: Exception) -> str | None:
    """Return in a line what the system refused: room, files, or a place to write. None for any
    other error, which may be ours, and keeps its traceback."""
    if isinstance(error, RuntimeError):  # torch's libraries, gloo among them, put it into the text
        found = [number for number in _NO_MORE if os.strerror(number) in str(error)]
        return f"{_refused(found[0])} ({str(error).splitlines()[0]:.200})" if found else None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    is_full = isinstance(error, MemoryError) or any(w in str(error) for w in _NO_MEMORY)
    if is_full and limit != resource.RLIM_INFINITY and isinstance(error, MemoryError | ImportError):
        return f"no more memory: this process may have {limit / 1e9:.1f} GB (ulimit -v); raise that"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = error.filename if isinstance(error.filename, str) else None
    if error.errno in _NO_MORE or (path is not None and error.errno in _NOT_THERE):
        return f"{path or 'the system'}: {_refused(error.errno)}"
    is_lost = error.errno in (errno.ENOENT, errno.ESTALE) and path is not None
    if is_lost and not Path(path or "").parent.exists():  # the folder of it was there before
        return f"{path}: {error.strerror}; its folder was moved or removed meanwhile"
    return None


def _refused(number: int) -> str:
    if number != errno.EMFILE:
        return os.strerror(number)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{os.strerror(number)}: this process may have {limit} (ulimit -n); raise that"


def _await_verdict(error: Exception) -> None:
    """Where this rank's connection to another broke, leave it to who finds out which one is gone:
    that ends this process."""
    failure = sys.modules.get("engine.ranks.failure")
    if failure is not None:
        failure.await_verdict(error)


def _tell_others(message: str, status: int, text: str = "", *, is_expected: bool) -> None:
    """End the other ranks and this process with a text, where it has joined any. Where they expect
    it, and it has not come to join them, tell them; return then."""
    failure = sys.modules.get("engine.ranks.failure")
    if failure is not None:  # not imported, it has joined nobody
        failure.tell_others(message, status, text)
    with contextlib.suppress(Exception):  # what ends this rank is said, not why no other heard it
        if is_expected and world_size_of_environment() > 1 and not is_under_torchrun():
            prepare_libraries(1)
            importlib.import_module("engine.ranks.start").decline(message)


def _call(train: Callable[[_Config], object] | str, config: _Config) -> None:
    """Call the function on the config, while somebody looks at whether the launcher is there."""
    waiting = getattr(config, "waiting", WaitingConfig())
    with watching_launcher(waiting.orphan_seconds):
        _prepared(train, config)(config)


def _call_stage(train: Callable[[_Config], object] | str, config: Any) -> None:
    """Call a stage, and say where things are and what comes next."""
    is_stage = isinstance(config, StageConfig)
    if not is_stage:
        _call(train, config)
        return
    is_writer = rank_of_environment() == 0
    step = newest_step(config.directory)
    _call(train, config)
    if is_writer:
        is_alone = world_size_of_environment() == 1
        for line in ending(config, step, recipe_of_process(), is_alone=is_alone):
            say(line)


def _prepared(
    train: Callable[[_Config], object] | str, config: _Config
) -> Callable[[_Config], object]:
    """Return the function, imported once the environment is what its libraries should find."""
    layouts = (getattr(config, name, None) for name in ("layout", "critic_layout"))
    tp = max(getattr(layout, "tp", 1) for layout in layouts)
    prepare_libraries(tp, getattr(config, "directory", None))
    if not isinstance(train, str):
        return train
    module, _, function = train.rpartition(".")
    return getattr(importlib.import_module(module), function)


def _stage_job(default: Any) -> Any:
    """Return the options of a stage's recipe: those of its config, --config and --dry-run."""
    kind: Any = type(default)
    stage = Annotated[kind, tyro.conf.arg(name="")]  # its fields without a prefix
    saved = Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="PATH",
            help="Start from the options of an earlier run, given as its folder or its "
            "config.json, instead of the recipe's.",
        ),
    ]
    dry_run = Annotated[
        tuple[str, ...] | None,  # words: none, a number, or a mistake
        tyro.conf.arg(
            metavar="[GPUS]",
            help="Check this run on so many GPUs, print its plan and leave: layouts, shapes, "
            "batches, checkpoints; takes no GPU, file or tokenizer. Without a number: on those of "
            "the recipe's launch, or the fewest that its layouts take.",
        ),
    ]
    fields = [("stage", stage), ("config", saved), ("dry_run", dry_run)]
    return dataclasses.make_dataclass("StageJob", fields)(default, None, None)


def _named_gpus(words: Sequence[str]) -> int | None:
    """Return the number of GPUs that --dry-run names, None without one; raises UserError."""
    if not words:
        return None
    is_number = len(words) == 1 and len(words[0]) <= _MAX_DIGITS and words[0].isdecimal()
    if not is_number or int(words[0]) < 1:
        named = quoted(" ".join(words))
        raise UserError(f"--dry-run takes a number of GPUs, at least 1, or none; got {named}")
    return int(words[0])


def _print_once(message: str) -> None:
    """Print on rank 0; another rank prints only if it still lives when rank 0 has had its say."""
    try:
        rank = rank_of_environment()
    except UserError:  # which is the message
        rank = 0
    if rank > 0:
        time.sleep(5.0)  # when rank 0 fails too, the launcher ends this process meanwhile
        message = f"[rank {rank}] {message}"
    say(message, stream=sys.stderr)
