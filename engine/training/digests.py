"""The bits of tensors as one number each, to ask whether two computed alike are the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22  # words that are spread to 64 bits at a time: 32 MiB; our choice


def digests(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return a number [n] int64 for the bits of each tensor, on the device that they lie on.

    It is sum (2 i + 1) x word i, modulo 2^64. A factor is odd, so that no word can change alone;
    several that change cancel out in one of very many cases. Nothing waits for the device.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([_digest(tensor.detach()) for tensor in tensors])


def _digest(tensor: Tensor) -> Tensor:
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].long()
        odd = torch.arange(2 * start + 1, 2 * (start + len(block)) + 1, 2, device=tensor.device)
        total += (block * odd).sum()
    return total
