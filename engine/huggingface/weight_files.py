"""The tensors in a folder of weights that others made, mapped: only what is used is read.

safetensors, or a torch file loaded with weights_only=True, each whole or in parts with an index.
Nothing but tensors is unpickled, and every failure is a UserError that names the file.
"""

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from engine.files import open_file, read_object

# In the order in which Hugging Face looks for them.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_PART_NAME = re.compile(r"[\w.-]+\.(safetensors|bin)")
_MAX_REASON = 200  # characters: a damaged header can make the library quote all of it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the file it is in."""

    path: Path
    tensor: Tensor


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model's folder by their names in the files; raises UserError.

    The folder holds model.safetensors or pytorch_model.bin, or parts of it and their index.
    """
    for single in _SINGLE_FILES:
        path = folder / single
        if path.exists():
            return {name: StoredTensor(path, tensor) for name, tensor in _open(path).items()}
        index = folder / f"{single}.index.json"
        if index.exists():
            return _open_parts(index)
    raise UserError(f"{folder} holds no {' or '.join(_SINGLE_FILES)}, nor an index of their parts")


def _open_parts(index: Path) -> dict[str, StoredTensor]:
    file_of = read_object(index).get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{index} has no weight_map")
    parts: dict[str, dict[str, Tensor]] = {}
    found = {}
    for name, part in file_of.items():
        if not isinstance(part, str) or not _PART_NAME.fullmatch(part):
            raise UserError(f"{index}: {name} is in {part!r}, which is no file of this folder")
        path = index.with_name(part)
        if part not in parts:
            parts[part] = _open(path)
        if name not in parts[part]:
            raise UserError(f"{path} holds no {name}, though {index.name} says so")
        found[name] = StoredTensor(path, parts[part][name])
    return found


def _open(path: Path) -> dict[str, Tensor]:
    open_file(path).close()  # says what is wrong with the path itself
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from None
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged, or holds more than tensors and would run code; "
            "get the model's safetensors files instead"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} is not a model's state dict of named tensors")
    return tensors


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n", 1)[0][:_MAX_REASON]
    return UserError(f"{path} is damaged or cut short ({reason}); download it again")
