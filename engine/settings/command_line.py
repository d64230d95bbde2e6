"""From a command line to a config, tyro's options over a default, its errors in two lines; and
from values to the options that give them."""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import tyro

from engine.environment import rank_of_environment
from engine.errors import UserError, cut
from engine.settings.checks import check_values
from engine.settings.typed_text import as_typed, is_typed

_Config = TypeVar("_Config")

_NAMELESS = ("stage", "plan", "config")  # parts of a job whose options have no prefix
_MAX_JOINED = 200
_MAX_PROBLEM = 800  # characters of tyro's words, which may hold all of a long option


def parse_config(default: _Config, arguments: Sequence[str] | None = None) -> _Config:
    """Return `default` with the fields that the command line names replaced; raises UserError."""
    named = sys.argv[1:] if arguments is None else arguments
    parse = functools.partial(
        tyro.cli,
        type(default),
        default=_with_named_parts(default, named),
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    printed = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    try:
        # Both streams: tyro chooses its box's characters and colours by what stdout can show.
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            found = parse()
    except SystemExit as stop:
        if stop.code:
            printed.seek(0)
            raise UserError(_parse_message(printed.read(), named)) from None
        if rank_of_environment() == 0:
            try:
                parse()  # --help: once more, for the terminal to see
            except BrokenPipeError:  # head has seen enough; nor is there anyone to flush to
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
    check_values(found, nameless=_NAMELESS)
    return _at_home(found)


def _at_home(value: Any) -> Any:
    """Return a value with the home folder for each ~ that begins a path, in all that it holds; a
    shell leaves it in --out=~/a, and behind a comma."""
    if isinstance(value, Path):
        return Path(",".join(map(os.path.expanduser, str(value).split(","))))
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found = {name: _at_home(part) for name, part in parts.items()}
    changes = {name: part for name, part in found.items() if part != parts[name]}
    return dataclasses.replace(value, **changes) if changes else value


def as_options(config: Any, values: Mapping[str, Any]) -> str:
    """Return the options that give a config other values, as a shell takes them.

    values: by the fields' dotted names, as engine.settings.saved writes them.
    """
    return " ".join(_option(_hint(type(config), name), name, v) for name, v in values.items())


def _hint(cls: Any, name: str) -> Any:
    first, _, rest = name.partition(".")
    hint = typing.get_type_hints(cls, include_extras=True)[first]
    classes = [c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)]
    return _hint(classes[0], rest) if rest and classes else hint


def _option(hint: Any, name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    if hint is bool:  # a flag, which has another name where it is off
        before, dot, last = option.removeprefix("--").rpartition(".")
        return option if value else f"--{before}{dot}no-{last}"
    if isinstance(value, list):
        return " ".join((option, *(_for_shell(str(each)) for each in value)))
    text = _for_shell(as_typed(value) if is_typed(hint) and value is not None else str(value))
    return f"{option}={text}" if text.startswith("-") else f"{option} {text}"


def _for_shell(text: str) -> str:
    """Return a word of a command line; what does not print is written by its escapes."""
    if text.isprintable():
        return shlex.quote(text)
    kept = (c if c.isprintable() and c not in "\\'" else _escaped(c) for c in text)
    return f"$'{''.join(kept)}'"


def _escaped(character: str) -> str:
    return f"\\{character}" if character in "\\'" else character.encode("unicode_escape").decode()


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


def _with_named_parts(default: _Config, arguments: Sequence[str], prefix: str = "--") -> _Config:
    """Return `default` with optional dataclasses that are None put to their own default, where the
    arguments name one of their fields or ask for help.

    tyro offers no field of what is not there.
    """
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


def _parse_message(box: str, arguments: Sequence[str]) -> str:
    """Return tyro's error box as two lines: what is wrong, and what was perhaps meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    blocks: list[list[str]] = [[]]  # the box separates its parts with ruled lines
    for line in lines:
        if line.startswith("───"):
            blocks.append([])
        else:
            blocks[-1].append(line)
    problem = cut(" ".join(blocks[0]) or box.strip(), _MAX_PROBLEM)
    advice = "run with --help to see every option"
    if len(blocks) > 1 and blocks[1][:1] == ["Perhaps you meant:"]:
        advice = f"perhaps you meant {blocks[1][1]}; {advice}"
    if problem.startswith("Unrecognized options: "):
        advice = _second_value(arguments, problem.partition(": ")[2]) or advice
    return f"{problem}\n{advice}"


def _second_value(arguments: Sequence[str], unknown: str) -> str:
    """Return what to say of a word that follows the value of an option that takes one, such as a
    second file; "" where the first of the unknown words is no such one.

    unknown: the words, as tyro lists them.
    """
    words = [part for word in arguments for part in _parts_of_option(word)]
    for index, word in enumerate(words):
        if word.startswith("-") or not unknown.startswith(word):
            continue
        before = list(itertools.takewhile(_is_value, reversed(words[:index])))
        if not before or len(before) == index or any(map(_is_number, (word, *before))):
            return ""
        option = words[index - len(before) - 1]
        values = [*reversed(before), *itertools.takewhile(_is_value, words[index:])]
        joined = _for_shell(",".join(value.strip(",") for value in values))
        return (
            f"{option} takes one value: files are joined by commas, {option} "
            f"{cut(joined, _MAX_JOINED)}; a pattern is quoted, and a text with blanks"
        )
    return ""


def _parts_of_option(word: str) -> list[str]:
    """Return a word, or the two that "--option=value" is."""
    return word.split("=", 1) if word.startswith("--") else [word]


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False
