"""Look at the checkpoints of a run without a network: `python -m engine.checkpoints verify RUN`.

verify reads every file, inspect says what is there; both end with status 1 where something is
damaged. Imports neither torch nor megatron.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.checkpoints.index import INDEX, read_index
from engine.checkpoints.manifest import MANIFEST, Damage, Manifest, check_files, read_manifest
from engine.checkpoints.pointers import pointed_checkpoint
from engine.checkpoints.recorded import check_counts, check_progress
from engine.checkpoints.retention import step_of
from engine.errors import UserError, named, quoted
from engine.files import read_object
from engine.printable import ERROR_CHARACTERS, open_console, printable, say, short_number
from engine.process.streams import make_streams_last
from engine.settings.command_line import parse_config

_CELL_CHARACTERS = 1000  # the most that is shown of a path or a word; our choice


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """Which checkpoints to look at, and how."""

    command: tyro.conf.Positional[Literal["verify", "inspect"]]
    """verify: read every file and compare checksums; inspect: say what each checkpoint holds."""
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run, or one of its checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    make_streams_last()
    default = CheckpointsConfig(command="verify", path=tyro.MISSING)
    try:
        config = parse_config(default, arguments)
        folders = checkpoints_at(config.path)
        if config.command == "verify":
            return verify(folders)
        return inspect(folders)
    except UserError as error:
        say(f"error: {error}", stream=sys.stderr, limit=ERROR_CHARACTERS)
        return 2
    return 0


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints of a run, and then the networks that it was made from; or the one that
    is named. Raises UserError where there is none."""
    if (path / MANIFEST).exists():
        return [path]
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(p for p in parent.glob("*_*") if p.is_dir() and not p.name.endswith(".partial"))
    found += sorted(p.parent for p in (path / "sources").glob(f"*/{MANIFEST}"))
    if not found:
        raise UserError(f"{path}: no checkpoint here (a run, or one of its checkpoints)")
    return found


def verify(folders: Sequence[Path]) -> int:
    """Say of each checkpoint whether it is whole, and what is wrong with `latest` and `selected`;
    return 1 where anything is, else 0."""
    num_damaged = 0
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            damage = check_files(folder, manifest, sorted(manifest.files))
            if not damage:
                _check_consistent(folder, manifest)
        except UserError as error:
            damage = str(error)
        num_damaged += bool(damage)
        say(damage or f"{folder}: whole, {len(manifest.files)} files, {_size(manifest)}")
    for pointer in (folders[0].with_name(name) for name in ("latest", "selected")):
        try:
            if os.path.lexists(pointer):
                pointed_checkpoint(pointer)
        except UserError as error:
            num_damaged += 1
            say(str(error))
    return int(num_damaged > 0)


def _check_consistent(folder: Path, manifest: Manifest) -> None:
    """Raise UserError where files that are as they were written make no checkpoint."""
    if (step := step_of(folder.name)) is not None and manifest.step != step:
        raise Damage(f"{folder}: damaged: it holds step {manifest.step}")
    roles = _roles(manifest)
    if not roles:
        raise Damage(f"{folder}: damaged: it holds no network")
    for role in roles:
        _row(folder / role, manifest)
    if manifest.step is not None:
        _metrics(folder)


def _roles(manifest: Manifest) -> list[str]:
    return sorted({name.partition("/")[0] for name in manifest.files if "/" in name})


def _metrics(folder: Path) -> dict[str, float]:
    path = folder / "progress.json"
    progress = read_object(path)
    try:
        check_progress(progress)
    except ValueError as error:
        raise Damage(f"{path}: {error}") from None
    return progress.get("metrics", {})


def inspect(folders: Sequence[Path]) -> int:
    """Print a table of what each checkpoint holds, and the numbers that it was saved with; return 1
    where one cannot be read, else 0."""
    num_damaged = 0
    for folder in folders:
        try:
            _show(folder, open_console())
        except UserError as error:
            num_damaged += 1
            say(str(error))
    return int(num_damaged > 0)


def _show(folder: Path, console: Console) -> None:
    manifest = read_manifest(folder)
    step = "weights alone" if manifest.step is None else f"step {manifest.step}"
    pointers = [p for p in ("latest", "selected") if _is_pointed(folder, p)]
    known = "".join(f", {pointer}" for pointer in pointers)
    columns = ("network", "kind", "size", "parameters", "dtype", "files", "optimizer")
    table = Table(*columns, title=_cell(f"{folder}: {step}, {_size(manifest)}{known}"))
    for role in _roles(manifest):
        table.add_row(*map(_cell, _row(folder / role, manifest)))
    console.print(table)
    if manifest.step is not None:
        shown = _metrics(folder).items()
        say("  ".join(f"{named(key)} {short_number(value)}" for key, value in shown))


def _is_pointed(folder: Path, pointer: str) -> bool:
    try:
        return pointed_checkpoint(folder.with_name(pointer)).name == folder.name
    except UserError:
        return False


def _row(folder: Path, manifest: Manifest) -> list[str]:
    description = read_object(folder / "network.json")
    index = read_index(folder, manifest)
    is_trained = "step" in index.counts
    try:
        if is_trained:
            check_counts(index.counts, is_scaled="grad_scaler" in index.counts)
    except ValueError as error:
        raise Damage(f"{folder / INDEX}: {error}") from None
    weights = {k: t for k, t in index.tensors.items() if not k.startswith("optimizer.")}
    size = description.get("size")
    shape = size if isinstance(size, dict) else {}
    files = [name for name in manifest.files if name.startswith(f"{folder.name}/")]
    return [
        folder.name,
        named(description.get("kind")),
        named(f"{quoted(shape.get('num_layers'))} x {quoted(shape.get('hidden_size'))}"),
        f"{sum(math.prod(t.shape) for t in weights.values()):,}",
        "/".join(sorted({t.dtype for t in weights.values()})),
        str(len(files)),
        f"step {index.counts['step']:.0f}" if is_trained else "none",
    ]


def _cell(text: str) -> Text:
    return Text(printable(text, limit=_CELL_CHARACTERS))


def _size(manifest: Manifest) -> str:
    return f"{sum(digest.bytes for digest in manifest.files.values()) / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
