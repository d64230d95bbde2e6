"""Where the key-value cache lies: in memory of one rollout, or at addresses that last over many."""

import warnings
from typing import Protocol

import torch
from torch import Tensor

from engine.generation.lasting_memory import LastingMemory, Unsupported


class CacheMemory(Protocol):
    """Lanes of memory that a rollout takes and gives back: keys and values of each layer."""

    lasts: bool
    """Whether a lane has the same address every time."""
    granularity: int
    """What a lane's bytes are rounded up to."""
    last_bytes: int
    """What it took last, beside torch's allocator."""

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return the lanes, each [num_bytes] uint8."""

    def give_back(self) -> None:
        """Free the lanes, whose tensors must not be used again."""


class PassingMemory:
    """Lanes of torch's own allocator, which end with the last tensor over them."""

    lasts = False
    granularity = 1
    last_bytes = 0

    def __init__(self, device: torch.device, *, num_lanes: int) -> None:
        self._device = device
        self._num_lanes = num_lanes

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return new lanes."""
        return [
            torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            for _ in range(self._num_lanes)
        ]

    def give_back(self) -> None:
        """Nothing: whoever has the tensors has the memory."""


def cache_memory(device: torch.device, *, num_lanes: int) -> CacheMemory:
    """Return lasting memory on a GPU; where its driver has none, or on the CPU, passing memory."""
    if device.type == "cuda":
        try:
            return LastingMemory(device, num_lanes=num_lanes)
        except Unsupported as reason:
            warnings.warn(
                f"the key-value cache cannot keep its addresses ({reason}): CUDA graphs are "
                "captured again in every rollout",
                stacklevel=2,
            )
    return PassingMemory(device, num_lanes=num_lanes)
