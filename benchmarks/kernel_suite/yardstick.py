"""What the memory of a device can do: the line that memory-bound kernels are measured against."""

from collections.abc import Callable

import torch

_MAX_BYTES = 2**30
"""Of each buffer; far more than a cache holds."""


def copy_of(num_bytes: int, device: torch.device) -> Callable[[], None]:
    """A call that reads half of num_bytes and writes the other half."""
    half = max(1, num_bytes // 2)
    source = torch.zeros(min(half, _MAX_BYTES), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, len(source))

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    copy()
    return copy
