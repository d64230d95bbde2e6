"""How many rows of logits exist at a time, where the whole of them never does.

A chunk of C rows reads and writes the weight's fp32 gradient once: 8 V H bytes, beside the 2 C V H
operations of one matrix product. On an H100 (790 TFLOP/s, 3 TB/s) that is 1050 / C of the product's
time, as far as nothing hides it. Of GPT-2's vocabulary 256 MiB hold 1280 rows, where it is 0.82 of
a product, and 448 MiB 2304, where it is 0.46. At H = 4096 the row kernels and the writing of fp32
logits add 0.13 of a product for every 4 bytes a logit. With half of the gradient's traffic hidden,
forward and backward should thus run at this share of their bare products:

                       256 MiB   448 MiB
    one pass, of 3         79%       83%
    two passes, of 4       82%       85%

These are estimates. At H = 2048, before the row kernels were fused, an H100 gave 77% for one pass
over 32768 rows with 448 MiB (benchmarks/results); nothing has been measured at 4096. A second
workspace would let the row kernels of one chunk run beside the products of the next. It would halve
C and lose most of what it wins.
"""

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cuda": 448 * 2**20, "cpu": 64 * 2**20}
"""Bound of a chunk of logits by type of device. With what else comes and goes: 512 MiB on a GPU."""
MOST_ROWS = 8192
"""A longer chunk gains nothing: a vocabulary shard takes less memory than the bound."""


def chunk_rows(num_rows: int, num_columns: int, itemsize: int, workspace_bytes: int) -> int:
    """Rows a chunk holds: as many as the workspace takes, evened out in steps of 128 (a tile)."""
    largest = min(MOST_ROWS, max(1, workspace_bytes // (num_columns * itemsize)))
    if largest > 128:
        largest -= largest % 128
    num_chunks = max(1, -(-num_rows // largest))
    even = -(-num_rows // num_chunks)
    return min(num_rows, largest, -(-even // 128) * 128)


def logit_workspace(
    num_rows: int, weight: Tensor, dtype: torch.dtype, workspace_bytes: int | None
) -> Tensor:
    """[C, V] uninitialised memory for the logits of a chunk of num_rows rows of weight [V, H].

    workspace_bytes bounds it; None for the device's `WORKSPACE_BYTES`.
    """
    default = WORKSPACE_BYTES[weight.device.type]
    budget = default if workspace_bytes is None else workspace_bytes
    size = chunk_rows(num_rows, len(weight), dtype.itemsize, budget)
    return torch.empty(size, len(weight), dtype=dtype, device=weight.device)
