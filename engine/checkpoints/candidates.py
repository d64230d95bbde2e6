"""Which networks lie on disk at a path, and what each says of itself: unread, by names alone.
Imports neither torch nor megatron.
"""

import os
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import MANIFEST, Damage, read_manifest
from engine.checkpoints.pointers import no_pointer, pointed_checkpoint, steps_in, up_to
from engine.errors import UserError
from engine.files import read_object
from models.sizes import GPTSize, Kind, size_of_json


def candidates_at(path: Path, role: str) -> dict[str, Any]:
    """Return the checkpoints that may hold a network, the best first, and its folder's name in
    them; and what is wrong with the pointer to the first: as this rank sees them, unread.

    {"folders": [...], "role": "policy", "damage": ""}; raises UserError where there is none.
    """
    if (path / "network.json").exists():
        path = path.resolve()
        return {"folders": [str(path.parent)], "role": path.name, "damage": ""}
    for parent in (path / "checkpoints", path):
        pointers = [p for p in (parent / "selected", parent / "latest") if os.path.lexists(p)]
        steps = steps_in(parent)
        if not pointers and steps:
            names = [step.name for step in steps]
            raise UserError(no_pointer(parent / "latest", "gone", names, "name that checkpoint"))
        if pointers:
            folders, damage = _pointed(pointers[0], steps)
            break
    else:
        folders, damage = [path], ""
        if not (path / MANIFEST).exists() and next(path.glob("*/network.json"), None) is None:
            raise UserError(
                f"{path}: no checkpoint of a {role} here (a run, a checkpoint or a network's "
                f"folder{', or a Hugging Face folder' if role == 'policy' else ''})"
            )
    _check_role(folders[0], role)
    return {"folders": [str(folder) for folder in folders], "role": role, "damage": damage}


def _pointed(pointer: Path, steps: list[Path]) -> tuple[list[Path], str]:
    """Return the checkpoints that a run is known by, the best first, and what is wrong with the
    pointer; raises UserError where there is none."""
    others = steps if pointer.name == "latest" else []  # a selection has no second best
    try:
        first = pointed_checkpoint(pointer)
    except UserError as error:
        if not others:
            raise
        return others, str(error)
    return up_to(first, others), ""


def _check_role(folder: Path, role: str) -> None:
    """Raise UserError where a checkpoint has other networks: no damage, but the user's mistake."""
    try:
        manifest = read_manifest(folder)
    except UserError:  # which whoever reads the files will say
        return
    roles = sorted(n.partition("/")[0] for n in manifest.files if n.endswith("/network.json"))
    if role not in roles:
        raise UserError(
            f"{folder}: no checkpoint of a {role} here; it holds {', '.join(roles) or 'none'}"
        )


def read_description(folder: Path) -> tuple[Kind, GPTSize, str]:
    """Return the kind and size of the network in a folder, and the fingerprint of its tokenizer, as
    network.json says; raises UserError where that cannot be."""
    path = folder / "network.json"
    description = read_object(path)
    kind, size, tokenizer = (description.get(key) for key in ("kind", "size", "tokenizer"))
    if kind not in ("language", "scalar") or not isinstance(tokenizer, str):
        raise Damage(f"{path}: not the kind, size and tokenizer of a network")
    try:
        return kind, size_of_json(size), tokenizer
    except ValueError as error:
        raise Damage(f"{path}: not the size of a network: {error}") from None
