"""Whether a checkpoint on disk is whole, which all ranks find out together: each reads its share of
the files, and all learn what is wrong with any."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
import xxhash

from engine.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    NewerForm,
    check_files,
    read_manifest,
)
from engine.checkpoints.retention import step_of
from engine.environment import rank_of_environment
from engine.errors import UserError
from engine.printable import ERROR_CHARACTERS, say
from engine.ranks.decision import Council
from engine.ranks.silence import ranks_named

_NEWER = "newer: "  # before what a rank reports of a checkpoint that is no damage
_RANK_IN_NAME = re.compile(r"-(\d+)\.safetensors$")
_seen: set[tuple] = set()
"""What this process has found as written: files by path, size and time of change."""
_said: set[str] = set()


def damage_of(folder: Path, is_needed: Callable[[str], bool] = lambda name: True) -> str:
    """Return what is wrong with a checkpoint, in a line, "" where nothing is: with its manifest, or
    the files that are needed. All ranks call together.

    Raises UserError where it is of a later version, or another one on some ranks, whose disks are
    their own: that is no damage, and not passed over.
    """

    def first(told: Sequence[str]) -> str:
        manifests, reports = zip(*(json.loads(text) for text in told), strict=True)
        found = next((report for report in reports if report), "")
        if found.startswith(_NEWER):
            raise UserError(found.removeprefix(_NEWER))
        others = [rank for rank, text in enumerate(manifests) if text not in ("", manifests[0])]
        if others and manifests[0]:
            raise UserError(
                f"{folder}: {ranks_named(others)} found another checkpoint there than rank 0; have "
                "all nodes see the same files"
            )
        return found

    return Council().decide(json.dumps(_damage_here(folder, is_needed)), first)


def newest_whole(
    candidates: Sequence[Path],
    is_needed: Callable[[str], bool] = lambda name: True,
    damage: str = "",
) -> tuple[Path | None, str]:
    """Return the first of some checkpoints that is whole, None where none is, and what is wrong
    with the first that is not. All ranks call together."""
    for folder in candidates:
        found = damage_of(folder, is_needed)
        if not found:
            return folder, damage
        damage = damage or found
    return None, damage


def warn(message: str) -> None:
    """Say something loudly, and once: on the first rank's stderr."""
    if rank_of_environment() == 0 and message not in _said:
        _said.add(message)
        say(f"WARNING: {message}", stream=sys.stderr, limit=ERROR_CHARACTERS)


def _damage_here(folder: Path, is_needed: Callable[[str], bool]) -> tuple[str, str]:
    """Return a digest of the manifest, and what this rank finds wrong with its share of the files.
    The digest is "" where the manifest cannot be read, which is damage too."""
    digest = ""
    try:
        manifest = read_manifest(folder)
        listed = repr((manifest.step, sorted(manifest.files.items())))
        digest = xxhash.xxh3_128_hexdigest(listed.encode())
        if (step := step_of(folder.name)) is not None and manifest.step != step:
            raise UserError(f"{folder / MANIFEST}: damaged: it is that of step {manifest.step}")
        mine = [name for name in sorted(manifest.files) if is_needed(name) and _is_mine(name)]
        unseen = [name for name in mine if _state(folder, manifest, name) not in _seen]
        damage = check_files(folder, manifest, unseen)
        if not damage:
            _seen.update(_state(folder, manifest, name) for name in unseen)
    except NewerForm as error:
        return digest, f"{_NEWER}{error}"
    except UserError as error:
        return digest, str(error)
    except OSError as error:  # a file is gone, or cannot be looked at
        return digest, f"{error.filename}: {error.strerror}"
    return digest, damage


def _is_mine(name: str) -> bool:
    """Whether this rank reads a file: that of its own number, as far as there are so many ranks."""
    if not dist.is_initialized():
        return True
    number = _RANK_IN_NAME.search(name)
    return (int(number[1]) if number else 0) % dist.get_world_size() == dist.get_rank()


def _state(folder: Path, manifest: Manifest, name: str) -> tuple:
    status = os.stat(folder / name)
    found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return (str(folder.resolve()), name, manifest.files[name], *found)
