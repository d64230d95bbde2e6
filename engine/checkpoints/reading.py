"""A network's tensors, read from the folder that a checkpoint of any layout has of it.

A rank reads of each stored piece what meets its own part, and no more. What its replicas hold too
one of them reads, and gives to the others.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from engine.checkpoints.boxes import overlap, within
from engine.checkpoints.index import Index, IndexedTensor, TensorPiece, piece_name
from engine.checkpoints.manifest import Damage
from engine.checkpoints.shards import Part, dealt
from engine.errors import UserError, named
from engine.files import open_file
from engine.ranks.parallel import Parallel

_SHOWN_CHARACTERS = 200  # of what the library says of a file, in an error; our choice


@torch.no_grad()
def read_shared(parts: Sequence[Part], folder: Path, index: Index, parallel: Parallel) -> None:
    """Fill parts that all replicas of this rank hold, each in its place; they call together.

    Raises UserError where the folder has no such tensor, or one of another shape.
    """
    group, num_ranks = parallel.replica_group, parallel.num_replicas
    owners = dealt(parts, num_ranks)
    mine = [p for p, owner in zip(parts, owners, strict=True) if owner == parallel.replica_rank]
    read_owned(mine, folder, index)
    if num_ranks > 1:
        for part, owner in zip(parts, owners, strict=True):
            dist.broadcast(part.tensor, dist.get_global_rank(group, owner), group=group)


@torch.no_grad()
def read_owned(parts: Iterable[Part], folder: Path, index: Index) -> None:
    """Fill parts that this rank alone holds, each in its place; raises UserError as read_shared
    does."""
    fills_of: dict[str, list[_Fill]] = {}
    for part in parts:
        for fill in _fills(part, folder, index):
            fills_of.setdefault(fill.piece.file, []).append(fill)
    for file, fills in fills_of.items():
        path = folder / file
        try:
            with _opened(path) as stored:
                for fill in fills:
                    fill.read(stored)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            cause = named(error, _SHOWN_CHARACTERS)
            raise Damage(f"{path}: cannot be read as tensors.json says ({cause})") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors, of a name that is no UTF-8 too, which the library does not take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open_file(path) as stream, _opened(Path(f"/proc/self/fd/{stream.fileno()}")) as stored:
            yield stored
        return
    with safe_open(path, framework="pt") as stored:
        yield stored


@dataclass(frozen=True)
class _Fill:
    """What a piece has of a part."""

    part: Part
    piece: TensorPiece
    dtype: str
    """Of the piece."""
    into: tuple[slice, ...]
    """Of the part."""
    cut: tuple[slice, ...]
    """Of the piece."""

    def read(self, stored: Any) -> None:
        """Copy it from the open file to its place."""
        name = piece_name(self.part.shard.name, self.piece.offset)
        found = stored.get_slice(name)
        if tuple(found.get_shape()) != self.piece.shape or found.get_dtype() != self.dtype:
            raise ValueError(f"{name} has another shape or dtype there")
        self.part.tensor[self.into].copy_(found[self.cut])


def _fills(part: Part, folder: Path, index: Index) -> Iterator[_Fill]:
    shard, stored = part.shard, index.tensors.get(part.shard.name)
    if stored is None:
        raise UserError(f"{folder}: it holds no {shard.name}")
    _check_shape(part, stored, folder)
    mine = (shard.offset, shard.shape)
    for piece in stored.pieces:
        theirs = (piece.offset, piece.shape)
        common = overlap(mine, theirs)
        if common is not None:
            into, cut = within(common, mine), within(common, theirs)
            yield _Fill(part, piece, stored.dtype, into, cut)


def _check_shape(part: Part, stored: IndexedTensor, folder: Path) -> None:
    if stored.shape != part.shard.global_shape:
        raise UserError(
            f"{folder}: {part.shard.name} is {list(stored.shape)}, this run's model has "
            f"{list(part.shard.global_shape)}"
        )
