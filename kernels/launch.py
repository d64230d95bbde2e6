"""Can Triton run on this tensor, and with which block size and how many warps.

A CUDA tensor runs compiled kernels. A CPU tensor runs the plain torch reference. Where
`TRITON_INTERPRET=1` was set before `kernels` was imported and still is, a CPU tensor runs the same
kernels in Triton's interpreter. Triton decides at decoration, so setting the variable later does
nothing; clearing it later returns CPU tensors to the reference.
"""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

_DECORATED_FOR_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class LaunchConfig:
    """How one program of a kernel is shaped."""

    block: int
    """Elements a program handles at a time; a power of two."""
    num_warps: int
    """Warps a program runs on."""
    num_stages: int = 1
    """Blocks of a row on their way at a time: from 2 on they are copied to shared memory ahead."""


LAUNCHES: dict[str, dict[str, LaunchConfig]] = {
    "default": {
        "row_state": LaunchConfig(4096, 8),
        "row_gradient": LaunchConfig(4096, 8),
        "row_pass": LaunchConfig(16384, 32),
        "kl_state": LaunchConfig(2048, 8),
        "kl_gradient": LaunchConfig(2048, 8),
    },
    "sm80": {
        "row_state": LaunchConfig(2048, 8),
        "row_gradient": LaunchConfig(2048, 8),
    },
    # The interpreter runs on short rows, in tests: blocks small enough that a row takes several.
    "cpu": {
        "row_state": LaunchConfig(64, 1),
        "row_gradient": LaunchConfig(64, 1),
        "row_pass": LaunchConfig(64, 1),
        "kl_state": LaunchConfig(64, 1),
        "kl_gradient": LaunchConfig(64, 1),
    },
}
"""By architecture and kernel; "default" serves those without an entry. `benchmarks.tune_kernels`
measures them. Rows of a vocabulary are read in blocks of 2048 to 4096: whole rows spill above 32K
columns."""


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter: set at import and not cleared since."""
    return _DECORATED_FOR_INTERPRETER and os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(tensor: Tensor) -> bool:
    """True when the Triton kernel runs for this tensor, False when the torch reference does."""
    return tensor.is_cuda or interpreting()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def num_warps_for(block: int) -> int:
    """Warps that give each thread 4 to 8 elements of a block: 1 up to 256, 16 from 4096."""
    return min(16, max(1, next_power_of_2(block) // 256))


def architecture(device: torch.device) -> str:
    """The key of the tables: "sm90" for a CUDA device of capability 9.0, "cpu" for the rest."""
    if device.type != "cuda":
        return "cpu"
    return _cuda_architecture(device)


@functools.cache
def _cuda_architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def config_for(kernel: str, columns: int, device: torch.device) -> LaunchConfig:
    """The configuration of a kernel, its block capped at the row length.

    It depends on the architecture and the row length alone, never on the number of tokens. So every
    tensor-parallel rank and every micro-batch adds up in the same order.
    """
    name = architecture(device)
    config = LAUNCHES.get(name, {}).get(kernel) or LAUNCHES["default"][kernel]
    block = next_power_of_2(columns)
    return config if block >= config.block else LaunchConfig(block, num_warps_for(block))
