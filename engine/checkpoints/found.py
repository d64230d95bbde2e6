"""Where a network lies on disk and what it is, as the first rank sees it.

Ranks that looked for themselves could see different states of a shared file system.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.ranks.first_rank import said_by_first_rank
from engine.settings.size import named_size
from engine.training.network import Network
from models.sizes import GPTSize


def find_network(path: Path, role: str) -> Path:
    """Return the folder of network `role` under a run, a checkpoint or the folder itself, as the
    first rank sees it; all ranks call together. Raises UserError."""
    return Path(said_by_first_rank(lambda: str(_find(path, role))))


def _find(path: Path, role: str) -> Path:
    for parent in (path / "checkpoints", path):
        pointers = [p for p in (parent / "selected", parent / "latest") if p.exists()]
        if pointers:
            path = parent / pointers[0].read_text().strip()
            break
    for folder in (path, path / role):
        if (folder / "network.json").exists():
            return folder
    roles = sorted(p.parent.name for p in path.glob("*/network.json"))
    raise UserError(
        f"{path}: no checkpoint of a {role} here"
        + (
            f"; it holds {', '.join(roles)}"
            if roles
            else " (a run, a checkpoint or a network's folder)"
        )
    )


def run_of(folder: Path) -> Path:
    """Return the run that a network's folder, RUN/checkpoints/STEP/ROLE, is a part of."""
    return folder.resolve().parents[2]


def size_of(path: Path, role: str) -> GPTSize:
    """Return the size of the network at `path`, as its network.json says; all ranks call
    together."""
    return GPTSize(**network_at(path, role)[1]["size"])


def network_at(path: Path, role: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a network and its description, as the first rank sees them."""

    def look() -> str:
        folder = _find(path, role)
        return json.dumps([str(folder), description_in(folder)])

    folder, description = json.loads(said_by_first_rank(look))
    return Path(folder), description


def description_in(folder: Path) -> dict[str, Any]:
    """Return what network.json says of the network in a folder: kind, size, tokenizer. Raises
    UserError."""
    try:
        return json.loads((folder / "network.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'network.json'}: cannot be read ({error})") from None


def check_description(
    description: dict[str, Any], folder: Path, network: Network, fingerprint: str
) -> None:
    """Raise UserError where a network on disk has another shape, or another tokenizer's."""
    written, wanted = GPTSize(**description["size"]), network.size
    for field in dataclasses.fields(GPTSize):
        a, b = getattr(written, field.name), getattr(wanted, field.name)
        if a != b:
            raise UserError(f"{folder}: {field.name} is {a}, this run's model has {b}")
    if fingerprint and description["tokenizer"] and description["tokenizer"] != fingerprint:
        raise UserError(
            f"{folder}: trained with another tokenizer than this run's; "
            "give the tokenizer that was saved beside that checkpoint's run"
        )


def check_named_size(name: str, path: Path, role: str) -> None:
    """Raise UserError where a size is named and the checkpoint's is another; vocabularies may
    differ."""
    if not name:
        return
    found = size_of(path, role)
    wanted = named_size(name)
    if dataclasses.replace(found, vocab_size=wanted.vocab_size) != wanted:
        raise UserError(
            f"{path}: the {role} has {found.num_layers} layers of width {found.hidden_size} and a "
            f"context of {found.context_length} tokens, a {name} has {wanted.num_layers} of "
            f"{wanted.hidden_size} and {wanted.context_length}"
        )
