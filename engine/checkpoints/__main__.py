"""Look at the checkpoints of a run without a network: `python -m engine.checkpoints verify RUN`.

verify reads every file, and ends with status 1 where one is not as it was written; inspect says
what is there. Imports neither torch nor megatron.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table
from rich.text import Text

from engine.checkpoints.index import INDEX, read_index
from engine.checkpoints.manifest import MANIFEST, Damage, Manifest, check_files, read_manifest
from engine.checkpoints.recorded import check_counts, check_progress
from engine.errors import UserError, named, quoted
from engine.files import read_object
from engine.printable import ERROR_CHARACTERS, open_console, printable, say
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
    default = CheckpointsConfig(command="verify", path=tyro.MISSING)
    try:
        config = parse_config(default, arguments)
        folders = checkpoints_at(config.path)
        if config.command == "verify":
            return verify(folders)
        inspect(folders)
    except UserError as error:
        say(f"error: {error}", stream=sys.stderr, limit=ERROR_CHARACTERS)
        return 2
    return 0


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints of a run, or the one that is named; raises UserError where there is
    none."""
    if (path / MANIFEST).exists():
        return [path]
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(p for p in parent.glob("*_*") if p.is_dir() and not p.name.endswith(".partial"))
    if not found:
        raise UserError(f"{path}: no checkpoint here (a run, or one of its checkpoints)")
    return found


def verify(folders: Sequence[Path]) -> int:
    """Say of each checkpoint whether it is whole; return 1 where one is not, else 0."""
    num_damaged = 0
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            damage = check_files(folder, manifest, sorted(manifest.files))
        except UserError as error:
            damage = str(error)
        num_damaged += bool(damage)
        say(damage or f"{folder}: whole, {len(manifest.files)} files, {_size(manifest)}")
    return int(num_damaged > 0)


def inspect(folders: Sequence[Path]) -> None:
    """Print a table of what each checkpoint holds, and the numbers that it was saved with."""
    console = open_console()
    for folder in folders:
        manifest = read_manifest(folder)
        step = "weights alone" if manifest.step is None else f"step {manifest.step}"
        columns = ("network", "kind", "size", "parameters", "dtype", "files", "optimizer")
        table = Table(*columns, title=_cell(f"{folder}: {step}, {_size(manifest)}"))
        for role in sorted({name.partition("/")[0] for name in manifest.files if "/" in name}):
            table.add_row(*map(_cell, _row(folder / role, manifest)))
        console.print(table)
        if manifest.step is not None:
            path = folder / "progress.json"
            progress = read_object(path)
            try:
                check_progress(progress)
            except ValueError as error:
                raise Damage(f"{path}: {error}") from None
            shown = progress.get("metrics", {}).items()
            say("  ".join(f"{named(key)} {value:.4g}" for key, value in shown))


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
