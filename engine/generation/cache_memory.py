"""Where the key-value cache lies: in memory of one rollout, or at addresses that last over many."""

import contextlib
import mmap
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
    """Lanes that end with the last tensor over them: torch's own on a GPU, large pages of the
    system's on the CPU."""

    lasts = False
    granularity = 1
    last_bytes = 0

    def __init__(self, device: torch.device, *, num_lanes: int) -> None:
        self._device = device
        self._num_lanes = num_lanes

    def take(self, num_bytes: int) -> list[Tensor]:
        """Return new lanes."""
        if self._device.type == "cpu":
            return list(_large_pages(self._num_lanes * num_bytes).split(num_bytes))
        return [
            torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            for _ in range(self._num_lanes)
        ]

    def give_back(self) -> None:
        """Nothing: whoever has the tensors has the memory."""


def _large_pages(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of new memory, in pages of 2 MiB where the system has them.

    torch's own comes in pages of 4 KiB, which a rollout takes and gives back one by one: it took
    4% more of a core's time with them (benchmarks.generation, 64 sequences of 4 layers x 256).
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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
