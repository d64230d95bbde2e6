"""What a rank of a job finds out about its node before the job starts, and what it must find."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from engine.environment import cache_folders, shared_file_system

ROOT = Path(__file__).parents[2]
GIB = 2**30
Scope = Literal["node", "link", "all"]
"""What a bandwidth is of: an all-reduce in a node, with the counterpart on a neighbour, of all."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank found out about its place."""

    rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    """Of the code and of what it stands on; the same everywhere, or there is a fault."""
    free_gib: float = 0.0
    disk_gib: float = 0.0
    disk_error: str = ""
    cache_error: str = ""
    """What is wrong with where compiled kernels are kept."""
    clock: float = 0.0
    """Seconds of the node's clock at a moment that all ranks share."""
    gb_s: dict[Scope, float] = field(default_factory=dict)
    """Bandwidths by what they are of, 0 where the measurement did not end; a link's is that of the
    better neighbour, for a slow node slows down its neighbours' links to it as well."""


def versions() -> dict[str, str]:
    """Return the versions that the ranks must agree on."""
    found = {"code": code_version(), "Python": platform.python_version()}
    for package in ("torch", "megatron-core", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def code_version(root: Path = ROOT) -> str:
    """Return a hash of the project's source files, of their names and contents."""
    digest = hashlib.sha256()
    for floor in ("kernels", "models", "engine", "recipes"):
        for path in sorted((root / floor).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the node where the device is its CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def disk_facts(directory: Path, rank: int) -> dict[str, Any]:
    """Return the free space where runs are written, and what went wrong with a file there."""
    error = _write_error(directory, rank)
    if error:
        return {"disk_error": error}
    return {"disk_gib": shutil.disk_usage(directory).free / GIB}


def cache_error(rank: int) -> str:
    """Return what is wrong with the folders of compiled kernels; nothing where each is the node's
    own and can be written."""
    for name, path in cache_folders().items():
        kind = shared_file_system(path)
        error = f"lies on {kind}, which nodes share" if kind else _write_error(path, rank)
        if error:
            return f"{name} {path}: {error}"
    return ""


def _write_error(directory: Path, rank: int) -> str:
    """Return what goes wrong with a file in a folder, which is made where it is missing."""
    path = directory / f".preflight_{rank}_{os.getpid()}"
    content = os.urandom(4096)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            is_as_written = path.read_bytes() == content
            return "" if is_as_written else "a file reads otherwise than it was written"
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
