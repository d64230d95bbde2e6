"""Which software a run's numbers come from: the packages beneath, and the project's own code."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import xxhash

# What computes, draws, reads or writes numbers. flash-attn computes attention where it is there.
PACKAGES = (
    *("torch", "triton", "megatron-core", "flash-attn", "numpy"),
    *("tokenizers", "sentencepiece", "safetensors"),
)
"""Distributions whose versions a run's numbers depend on."""
_ROOT = Path(__file__).parents[2]
_FLOORS = ("engine", "models", "kernels")
_GIT_SECONDS = 10  # for an answer of git's; our choice


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES; "none" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@functools.lru_cache(maxsize=1)
def code_digest() -> str:
    """Return a digest of the project's code that runs, by the names and contents of its files: as
    this process first saw them, since what it has loaded does not change with them."""
    state = xxhash.xxh3_128()
    for floor in _FLOORS:
        for path in sorted((_ROOT / floor).rglob("*.py")):
            content = path.read_bytes()
            state.update(f"{path.relative_to(_ROOT)} {len(content)} ".encode() + content)
    return state.hexdigest()


@functools.lru_cache(maxsize=1)
def code_commit() -> str:
    """Return the commit of the project's own repository, for people; "" where there is none, as of
    an installed copy."""
    if not (_ROOT / ".git").exists():
        return ""
    command = ("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
