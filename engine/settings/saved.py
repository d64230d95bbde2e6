"""A config as JSON and back: what a run's folder keeps of how it was started."""

import contextlib
import dataclasses
import enum
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from engine.errors import UserError, named, quoted
from engine.files import MAX_SHOWN_PATH, read_object, replacing

_Config = TypeVar("_Config")

_MAX_BYTES = 16 << 20  # of a config's file; our choice: ours have some thousand, and 400 for a
# file of data, which may be thousands

EARLIER = "earlier"
"""In a field's metadata: the value that a file from before the field stands for, where runs of then
did not do what its default does. So a run is compared, repeated and replayed as what it was."""
INHERITS = "inherits"
"""In a field's metadata: None stands for whatever the run has, or the run before it had."""


def save_config(config: Any, path: Path) -> None:
    """Write a config dataclass as JSON, whole or not at all; makes its folder."""
    with replacing(path) as stream:
        stream.write(config_text(config).encode())


def config_text(config: Any) -> str:
    """Return a config dataclass as JSON, as save_config writes it."""
    return json.dumps(_encode(config), indent=2) + "\n"


def changed_fields(config: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Return {dotted name: (saved, now)} of the fields that differ from what save_config wrote to
    `path`; a field that only one of the two has is left out, but for those with an EARLIER value.
    So is one that INHERITS and is None.
    """
    now = saved_fields(config)
    for name in _inherited(config):
        del now[name]
    saved = _flat(_earlier(config)) | _flat(read_object(path, max_bytes=_MAX_BYTES))
    return {
        name: (saved[name], value)
        for name, value in now.items()
        if name in saved and saved[name] != value
    }


def saved_fields(config: Any, of_path: Callable[[Path], str] = str) -> dict[str, Any]:
    """Return {dotted name: value} of what save_config writes; of_path: what stands for a path."""
    return _flat(_encode(config, of_path))


def with_saved_fields(config: _Config, values: Mapping[str, Any]) -> _Config:
    """Return a config with other values, by the fields' dotted names, as save_config writes them;
    raises UserError for what is no value of its field."""
    nested = _encode(config)
    for name, value in values.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner[part]
        inner[last] = value
    try:
        return _decode(type(config), nested, "")
    except ValueError as error:
        raise UserError(str(error)) from None


def load_config(cls: type[_Config], path: Path) -> _Config:
    """Return the `cls` that save_config wrote; a field that the file lacks takes its EARLIER value,
    or its default.

    Raises UserError for a missing or malformed file, an unknown field, a value of another type.
    """
    values = read_object(path, max_bytes=_MAX_BYTES)
    try:
        return _decode(cls, values, "")
    except (UserError, ValueError) as error:
        raise UserError(f"{named(path, MAX_SHOWN_PATH)}: {error}") from None


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted name: value} of nested objects, however deep they are."""
    found: dict[str, Any] = {}
    open_values: list[tuple[str, Any]] = [("", values)]
    while open_values:
        prefix, value = open_values.pop()
        if isinstance(value, dict):
            dot = "." if prefix else ""
            open_values += [(f"{prefix}{dot}{name}", inner) for name, inner in value.items()][::-1]
        else:
            found[prefix] = value
    return found


def _earlier(config: Any) -> dict[str, Any]:
    """Return the EARLIER values of a config and of those in it, nested as they are."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if EARLIER in field.metadata:
            found[field.name] = field.metadata[EARLIER]
        elif dataclasses.is_dataclass(value):
            found[field.name] = _earlier(value)
    return found


def _inherited(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of fields that are None and INHERIT."""
    found = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found += _inherited(value, f"{name}.")
        elif value is None and INHERITS in field.metadata:
            found.append(name)
    return found


def _encode(value: Any, of_path: Callable[[Path], str] = str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name), of_path) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return of_path(value)
    if isinstance(value, list | tuple):
        return [_encode(item, of_path) for item in value]
    if isinstance(value, dict):
        return {str(key): _encode(item, of_path) for key, item in value.items()}
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
        return {k: _decode(arguments[1], v, f"{where}.{named(k)}") for k, v in value.items()}
    if origin is Literal and value in arguments:
        return value
    if hint is float and type(value) is int:  # JSON has one kind of number
        if abs(value) > sys.float_info.max:
            raise ValueError(f"{where} is too large: {quoted(value)}")
        return float(value)
    if isinstance(hint, type) and isinstance(value, str):
        if issubclass(hint, enum.Enum) and value in hint.__members__:
            return hint[value]
        if issubclass(hint, Path):
            return hint(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{where or 'the file'} cannot be {quoted(value)}")


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
        raise ValueError(f"unknown field {prefix}{named(unknown[0])}")
    earlier = {
        f.name: f.metadata[EARLIER] for f in dataclasses.fields(cls) if EARLIER in f.metadata
    }
    given = {name: _decode(hints[name], v, f"{prefix}{name}") for name, v in values.items()}
    return cls(**earlier | given)


def _decode_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        with contextlib.suppress(ValueError):
            return _decode(choice, value, where)
    raise ValueError(f"{where} cannot be {quoted(value)}")
