"""Which of an exported model's tensors lie in which file, alike on all ranks."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.ranks.parallel import Parallel
from models.huggingface.families import Family
from models.huggingface.tensors import stored_tensors
from models.sizes import GPTSize


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model as it is written."""

    family: Family
    size: GPTSize
    """Its vocabulary may have a token for padding more than the network's."""
    dtype: torch.dtype


def plan_files(
    names: list[str], exported: Exported, file_bytes: int, parallel: Parallel
) -> dict[str, tuple[int, list[str]]]:
    """Return {file: (pipeline stage, our parameters)}, alike on all ranks; `names` are those of
    this stage.

    A file has at most `file_bytes` bytes, or one of our parameters.
    """
    by_stage: list[list[str]] = [[]] * parallel.layout.pp
    dist.all_gather_object(by_stage, names, group=parallel.pp_group)
    groups: list[tuple[int, list[str]]] = []
    for stage, stage_names in enumerate(by_stage):
        room = -1
        for name in stage_names:
            num_bytes = _stored_bytes(name, exported)
            if num_bytes > room:
                groups.append((stage, []))
                room = file_bytes
            groups[-1][1].append(name)
            room -= num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def index_of(files: dict[str, tuple[int, list[str]]], exported: Exported) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    file_of: dict[str, str] = {}
    total = 0
    for file, (_, names) in files.items():
        for name in names:
            stored = stored_tensors(name, exported.family, exported.size)
            file_of |= {tensor.name: file for tensor in stored}
            total += _stored_bytes(name, exported)
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def _stored_bytes(name: str, exported: Exported) -> int:
    """Return the bytes of what our parameter is exported as."""
    stored = stored_tensors(name, exported.family, exported.size)
    return sum(math.prod(tensor.shape) for tensor in stored) * exported.dtype.itemsize
