"""The tensors in a folder of weights that others made: only what is used is read.

safetensors, or torch.save's files, each whole or in parts with an index. Nothing is unpickled,
types and shapes are known before a number is read, and every failure is a UserError that names the
file.
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError, named
from engine.files import open_file, read_object, refuse_lfs_pointer
from engine.huggingface.foreign import held_instead
from engine.huggingface.torch_files import find_tensors, map_tensor

# In the order in which Hugging Face looks for them.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_PART_NAME = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)")
# All our choice. GPT-3 in files of 5 GB has 70 parts, and 0.2 MB of header in all.
_MAX_PARTS = 1000
_MAX_HEADER_BYTES = 16 << 20
_MAX_INDEX_BYTES = 16 << 20
_MOST_SHOWN = 80  # characters of a text from a file in an error
_MAX_REASON = 200  # characters: a damaged header can make the library quote all of it
# The types that a weight may have, and those of the constants beside them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the file it is in."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns the tensor, mapped; raises UserError."""


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model's folder by their names in the files; raises UserError.

    The folder holds model.safetensors or pytorch_model.bin, or parts of it and their index.
    """
    for single in _SINGLE_FILES:
        path = folder / single
        if os.path.lexists(path):
            return _open(path)
        index = folder / f"{single}.index.json"
        if os.path.lexists(index):
            return _open_parts(index)
    raise UserError(
        f"{folder} holds no {' or '.join(_SINGLE_FILES)}, nor an index of their parts"
        f"{held_instead(folder)}"
    )


def _open_parts(index: Path) -> dict[str, StoredTensor]:
    file_of = read_object(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{index} has no weight_map")
    for name, part in file_of.items():
        if not isinstance(part, str) or not _PART_NAME.fullmatch(part):
            shown = f"{name!r:.{_MOST_SHOWN}} is in {part!r:.{_MOST_SHOWN}}"
            raise UserError(f"{index}: {shown}, which is no file of this folder")
    num_parts = len(set(file_of.values()))
    if num_parts > _MAX_PARTS:
        raise UserError(f"{index} names {num_parts} files; {_MAX_PARTS} are the most that are read")
    parts = {part: _open(index.with_name(part)) for part in sorted(set(file_of.values()))}
    for name, part in file_of.items():
        if name not in parts[part]:
            raise UserError(
                f"{index.with_name(part)} holds no {name!r:.{_MOST_SHOWN}}, "
                f"though {index.name} says so"
            )
    return {name: parts[part][name] for name, part in file_of.items()}


def _open(path: Path) -> dict[str, StoredTensor]:
    with open_file(path) as stream:
        refuse_lfs_pointer(path, stream.read(64))
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return {
        name: StoredTensor(
            path, located.dtype, located.shape, functools.partial(map_tensor, path, located)
        )
        for name, located in find_tensors(path).items()
    }


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    with open_file(path) as stream:
        # Its first eight bytes are the header's length, which the library reads whatever it is.
        num_bytes = int.from_bytes(stream.read(8), "little")
    if num_bytes > _MAX_HEADER_BYTES:
        raise _damaged(path, f"a header of {num_bytes} bytes; {_MAX_HEADER_BYTES} are the most")
    try:
        weights = safe_open(path, framework="pt")
        found = {}
        for name in weights.keys():  # noqa: SIM118 - no mapping, but the library's handle
            view = weights.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                shown = f"{name!r:.{_MOST_SHOWN}} is {view.get_dtype()}"
                raise UserError(f"{path}: {shown}; {', '.join(_DTYPES)} are read")
            read = functools.partial(_read_safetensor, path, weights, name)
            dtype = _DTYPES[view.get_dtype()]
            found[name] = StoredTensor(path, dtype, tuple(view.get_shape()), read)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    return found


def _read_safetensor(path: Path, weights: safe_open, name: str) -> Tensor:
    try:
        return weights.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> UserError:
    reason = named(reason.split("\n", 1)[0], _MAX_REASON)  # it may quote the file
    return UserError(f"{path} is damaged or cut short ({reason}); download it again")
