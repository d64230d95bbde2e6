"""How plain torch reads rows of logits: a block of them at a time, in the cores' caches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.precision import accumulation_dtype

BLOCK_WORDS = 1 << 18
"""Numbers of a block of rows on one core of a CPU: 1 MiB in fp32, half of a second-level cache."""


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Cut the rows of a matrix [T, V] into blocks that stay in the cores' caches from one operation
    of a reference to the next."""
    size = max(1, BLOCK_WORDS * torch.get_num_threads() // max(1, matrix.shape[1]))
    return (slice(start, start + size) for start in range(0, len(matrix), size))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in the accumulation dtype; the logits themselves where that is them."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return logits if temperature == 1 else logits / temperature
