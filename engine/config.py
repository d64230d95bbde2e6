"""From a command line to a frozen config, from there to JSON and back, and the user's errors.

Imports neither torch nor megatron, so that the planner answers at once.
"""

import contextlib
import dataclasses
import enum
import functools
import importlib
import io
import json
import math
import os
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import docstring_parser
import tyro

from engine.environment import prepare_libraries, rank_of_environment
from engine.stop import noting_signals

Config = TypeVar("Config")

# megatron-core tells every process that Transformer Engine and Apex are absent, and torch of names
# that megatron still uses. Set here, since every entry point imports this file before megatron.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")


class UserError(Exception):
    """A mistake of the user's: a file, a line, a field or an option, said in one or two lines."""


def run_stage(
    train: Callable[[Config], object] | str,
    default: Config,
    arguments: Sequence[str] | None = None,
    *,
    has_dry_run: bool = True,
) -> None:
    """Parse the command line over `default` and call `train(config)`: the whole body of a recipe.

    `train` may be the module that has it, such as "engine.sft", for this file must not reach torch
    by an import. It takes torch's seconds to import, which --help and a wrong option need not wait
    for, and in which signals are noted already (engine/stop.py).

    Field `data.skip_bad_lines` is the option `--data.skip-bad-lines`. A UserError, and an unknown
    option is one, prints `error: ...` on stderr without a traceback and exits with status 2. Where
    one rank fails, all end (engine/failure.py).
    `arguments` replaces sys.argv[1:]. `--config` reads a saved config and lays the other options
    over it; `--dry-run GPUS` checks the stage (engine/dry_run.py) instead of running it.
    """
    try:
        if not has_dry_run:
            config = parse_config(default, arguments)
            _prepared(train, config)(config)
            return
        job = parse_config(_stage_job(default), arguments)
        if job.config is not None:
            path = job.config / "config.json" if job.config.is_dir() else job.config
            job = parse_config(_stage_job(load_config(type(default), path)), arguments)
        if job.dry_run is None:
            with noting_signals():
                _prepared(train, job.stage)(job.stage)
        elif rank_of_environment() == 0:
            importlib.import_module("engine.dry_run").dry_run(job.stage, job.dry_run)
    except UserError as error:
        _print_once(f"error: {error}")
        _tell_others(f"error: {error}", 2)
        sys.exit(2)
    except Exception as error:
        text = "".join(traceback.format_exception(error)).rstrip()
        _tell_others(text.rpartition("\n")[2], 1, text)
        raise


def _tell_others(message: str, status: int, text: str = "") -> None:
    """End the other ranks and this process with a text, where it has joined any."""
    failure = sys.modules.get("engine.failure")
    if failure is not None:  # not imported, there is nobody
        failure.tell_others(message, status, text)


def _prepared(
    train: Callable[[Config], object] | str, config: Config
) -> Callable[[Config], object]:
    """Return the function, imported after the environment is what its libraries should find."""
    layouts = (getattr(config, name, None) for name in ("layout", "critic_layout"))
    prepare_libraries(tp=max(getattr(layout, "tp", 1) for layout in layouts))
    return importlib.import_module(train).train if isinstance(train, str) else train


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
    num_gpus = Annotated[
        int | None,
        tyro.conf.arg(
            metavar="GPUS",
            help="Check this run on so many GPUs, print its plan and leave: layouts, shapes, "
            "batches, checkpoints; takes no GPU, file or tokenizer.",
        ),
    ]
    fields = [("stage", stage), ("config", saved), ("dry_run", num_gpus)]
    return dataclasses.make_dataclass("StageJob", fields)(default, None, None)


def parse_config(default: Config, arguments: Sequence[str] | None = None) -> Config:
    """Return `default` with the fields that the command line names replaced; raises UserError."""
    named = sys.argv[1:] if arguments is None else arguments
    parse = functools.partial(
        tyro.cli,
        type(default),
        default=_with_named_parts(default, named),
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        # Both streams: tyro chooses its box's characters and colours by what stdout can show.
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parse()
    except SystemExit as stop:
        if stop.code:
            printed.seek(0)
            raise UserError(_parse_message(printed.read())) from None
        if rank_of_environment() == 0:
            try:
                parse()  # --help: once more, for the terminal to see
            except BrokenPipeError:  # head has seen enough; nor is there anyone to flush to
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _in_one_paragraph(read: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the reader of fields' docstrings that tyro calls: their later lines are indented, and
    tyro takes an indented line for a paragraph of its own."""

    def wrapper(source: object) -> Any:
        found = read(source)
        for field in found.params:
            field.description = " ".join((field.description or "").split()) or None
        return found

    return wrapper


docstring_parser.parse_from_object = _in_one_paragraph(docstring_parser.parse_from_object)


def _with_named_parts(default: Config, arguments: Sequence[str], prefix: str = "--") -> Config:
    """Return `default` with every optional dataclass in it that is None put to that dataclass's own
    default, if the arguments name one of its fields or ask for help: tyro offers no field of what
    is not there."""
    changes: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(default)).items():
        value, inner = getattr(default, name), f"{prefix}{name.replace('_', '-')}."
        is_named = any(word.replace("_", "-").startswith(inner) for word in arguments)
        classes: list[Any] = [c for c in typing.get_args(hint) if dataclasses.is_dataclass(c)]
        if value is None and classes and (is_named or {"-h", "--help"} & set(arguments)):
            changes[name] = value = classes[0]()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = prefix if name == "stage" else inner  # of a stage's job
            changes[name] = _with_named_parts(value, arguments, inner)
    return dataclasses.replace(default, **changes) if changes else default  # type: ignore[type-var]


def check_numbers(
    config: object,
    prefix: str = "",
    *,
    counts: str = "",
    positive: str = "",
    not_negative: str = "",
    shares: str = "",
) -> None:
    """Raise UserError for a field of a config whose number means nothing; None means none.

    The names of fields are separated by spaces: counts are at least 1, shares from 0 to 1, and all
    are finite.
    """
    rules: list[tuple[str, Callable[[float], bool], str]] = [
        (counts, lambda value: value >= 1, "at least 1"),
        (positive, lambda value: value > 0, "positive"),
        (not_negative, lambda value: value >= 0, "at least 0"),
        (shares, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ]
    for names, holds, wanted in rules:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):  # NaN keeps no rule
                raise UserError(f"{prefix}{name} must be {wanted}, got {value}")
            if value == math.inf:
                raise UserError(f"{prefix}{name} must be finite, got {value}")


def save_config(config: Any, path: Path) -> None:
    """Write a config dataclass as JSON, whole or not at all; makes its folder."""
    from engine.data.files import replacing  # files.py takes UserError from here

    text = json.dumps(_encode(config), indent=2) + "\n"
    with replacing(path) as stream:
        stream.write(text.encode())


def changed_fields(config: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Return {dotted name: (saved, now)} of the fields that differ from what save_config wrote to
    `path`; a field that only one of the two has is left out."""

    def flat(values: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(values, dict):
            return {prefix: values}
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}.{name}" if prefix else name)
        return found

    now, saved = flat(_encode(config), ""), flat(_read_json(path), "")
    return {
        name: (saved[name], value)
        for name, value in now.items()
        if name in saved and saved[name] != value
    }


def load_config(cls: type[Config], path: Path) -> Config:
    """Return the `cls` that save_config wrote; a field that the file lacks takes its default.

    Raises UserError for a missing or malformed file, an unknown field, a value of another type.
    """
    try:
        return _decode(cls, _read_json(path), "")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _print_once(message: str) -> None:
    """Print on rank 0; another rank prints only if it still lives when rank 0 has had its say."""
    rank = rank_of_environment()
    if rank > 0:
        time.sleep(5.0)  # when rank 0 fails too, the launcher ends this process meanwhile
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr, flush=True)


def _parse_message(box: str) -> str:
    """Return tyro's error box as two lines: what is wrong, and what was perhaps meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    blocks: list[list[str]] = [[]]  # the box separates its parts with ruled lines
    for line in lines:
        if line.startswith("───"):
            blocks.append([])
        else:
            blocks[-1].append(line)
    problem = " ".join(blocks[0]) or box.strip()
    advice = "run with --help to see every option"
    if len(blocks) > 1 and blocks[1][:1] == ["Perhaps you meant:"]:
        advice = f"perhaps you meant {blocks[1][1]}; {advice}"
    return f"{problem}\n{advice}"


def _read_json(path: Path) -> Any:
    from engine.data.files import open_file

    with open_file(path) as stream:
        text = stream.read()
    try:
        return json.loads(text)
    except ValueError as error:  # json.JSONDecodeError is one, and says the line
        raise UserError(f"{path}: {error}") from None


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}: {value!r}")


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint`; ValueError names the field by its dotted path `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _decode_dataclass(hint, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin in (list, tuple) and isinstance(value, list):
        return _decode_sequence(hint, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is Literal and value in arguments:
        return value
    if hint is float and type(value) is int:  # JSON has one kind of number
        return float(value)
    if isinstance(hint, type) and isinstance(value, str):
        if issubclass(hint, enum.Enum) and value in hint.__members__:
            return hint[value]
        if issubclass(hint, Path):
            return hint(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{where or 'the file'} cannot be {value!r}")


def _decode_sequence(hint: Any, values: list[Any], where: str) -> Any:
    arguments = typing.get_args(hint)
    is_fixed = typing.get_origin(hint) is tuple and arguments[1:] != (Ellipsis,)
    hints = arguments if is_fixed else arguments[:1] * len(values)
    if len(hints) != len(values):
        raise ValueError(f"{where} wants {len(hints)} values, not {len(values)}")
    pairs = enumerate(zip(hints, values, strict=True))
    return typing.get_origin(hint)(_decode(h, v, f"{where}.{i}") for i, (h, v) in pairs)


def _decode_dataclass(cls: Any, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"unknown field {prefix}{unknown[0]}")
    return cls(**{name: _decode(hints[name], v, f"{prefix}{name}") for name, v in values.items()})


def _decode_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        with contextlib.suppress(ValueError):
            return _decode(choice, value, where)
    raise ValueError(f"{where} cannot be {value!r}")
