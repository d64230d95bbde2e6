"""What of a network lies in which file: tensors.json, beside the files.

    {"tensors": {"decoder.layers.mlp.linear_fc1.weight": {
         "dtype": "BF16", "shape": [24, 8192, 2048],
         "pieces": [{"file": "weights-00000.safetensors", "offset": [0, 0, 0],
                     "shape": [1, 8192, 2048]}, ...]}, ...},
     "counts": {...}}

A tensor of every layer is one tensor, the layer its first dimension; a piece is a box of it. Names
and shapes are those of megatron's `fully_reshardable` form. Imports neither torch nor megatron.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import Damage, Manifest
from engine.errors import UserError, named, quoted
from engine.files import read_object

INDEX = "tensors.json"
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element by safetensors' names of dtypes, of those that a checkpoint may hold."""
_FILE = re.compile(r"(weights|optimizer)-\d{5,9}\.safetensors", re.ASCII)
_OPTIMIZER = "optimizer."  # begins the names of its tensors, which lie in files of their own
_MAX_DIMENSIONS = 4  # layer, rows, columns, and one to spare
_LARGEST = 1 << 48  # of an extent


@dataclass(frozen=True)
class TensorPiece:
    """A box of a tensor, and the file that has it."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class IndexedTensor:
    """A whole tensor and where its pieces are."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The tensors of a network's folder by name, and the optimizer's counts."""

    tensors: dict[str, IndexedTensor]
    counts: dict[str, Any]


def piece_name(tensor: str, offset: tuple[int, ...]) -> str:
    """Return the name that a piece has within its file."""
    return f"{tensor}@{','.join(map(str, offset))}"


def index_text(index: Index) -> str:
    """Return the text of tensors.json."""
    tensors = {
        name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "pieces": [
                {"file": piece.file, "offset": piece.offset, "shape": piece.shape}
                for piece in tensor.pieces
            ],
        }
        for name, tensor in sorted(index.tensors.items())
    }
    return json.dumps({"tensors": tensors, "counts": index.counts})


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Return the index of a network's folder; raises Damage where it is none, or promises more
    than its files hold.

    Whoever takes memory for a tensor that it lists takes no more than lies on the disk.
    """
    path = folder / INDEX
    try:
        content = read_object(path)
        tensors, counts = content["tensors"], content["counts"]
        found = {name: _tensor(name, value) for name, value in tensors.items()}
        if not isinstance(counts, dict):
            raise ValueError("counts are no object")
        _check_bytes(found, folder, manifest)
    except UserError as error:
        raise Damage(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damage(f"{path}: no index of tensors ({named(error)})") from None
    return Index(tensors=found, counts=counts)


def _tensor(name: str, value: Any) -> IndexedTensor:
    dtype, shape = value["dtype"], _numbers(value["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"a dtype {quoted(dtype)}")
    files = "optimizer-" if name.startswith(_OPTIMIZER) else "weights-"
    pieces = tuple(_piece(piece, shape, files) for piece in value["pieces"])
    if not _are_whole(pieces, shape):
        raise ValueError("pieces that leave a gap or overlap")
    return IndexedTensor(dtype, shape, pieces)


def _are_whole(pieces: Sequence[TensorPiece], shape: tuple[int, ...]) -> bool:
    """Return whether boxes within a tensor cover each of its elements once.

    Where every corner but the tensor's own is one of an even number of boxes, every element lies in
    an odd number of them: in one, as there are no more elements.
    """
    corners: set[tuple[int, ...]] = set()
    for offset, extents in [((0,) * len(shape), shape), *((p.offset, p.shape) for p in pieces)]:
        ends = [(at, at + extent) for at, extent in zip(offset, extents, strict=True)]
        for corner in itertools.product(*ends):
            corners ^= {corner}
    return not corners and sum(math.prod(p.shape) for p in pieces) == math.prod(shape)


def _piece(value: Any, whole: tuple[int, ...], files: str) -> TensorPiece:
    file, offset, shape = value["file"], _numbers(value["offset"]), _numbers(value["shape"])
    if not isinstance(file, str) or not _FILE.fullmatch(file) or not file.startswith(files):
        raise ValueError(f"a piece in {quoted(file)}")
    if not len(offset) == len(shape) == len(whole) or any(
        at + size > extent for at, size, extent in zip(offset, shape, whole, strict=True)
    ):
        raise ValueError("a piece outside of its tensor")
    if 0 in shape:  # millions of them would take no byte of a file
        raise ValueError("a piece of nothing")
    return TensorPiece(file, offset, shape)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("a shape or offset that is no short list")
    if any(type(number) is not int or not 0 <= number <= _LARGEST for number in value):
        raise ValueError("a shape or offset with something else than counts")
    return tuple(value)


def _check_bytes(tensors: Mapping[str, IndexedTensor], folder: Path, manifest: Manifest) -> None:
    promised: dict[str, int] = {}
    for tensor in tensors.values():
        for piece in tensor.pieces:
            num_bytes = math.prod(piece.shape) * DTYPE_BYTES[tensor.dtype]
            promised[piece.file] = promised.get(piece.file, 0) + num_bytes
    for file, num_bytes in promised.items():
        listed = manifest.files.get(f"{folder.name}/{file}")
        if listed is None or listed.bytes < num_bytes:
            raise Damage(f"{folder / INDEX}: {file} is not listed, or has less than is said")
