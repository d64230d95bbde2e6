"""Log-probs and entropies of rows whose vocabulary lies in shards, from the shards' states.

The formulas of a state and of the merge are in row_state.py. The shards are added up in their
order, so that every rank has the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import uses_triton
from kernels.row_state import (
    RowResults,
    RowSpec,
    logprobs_and_entropy,
    row_outputs,
)
from kernels.traced import traced

_BLOCK = 256
"""Rows of a program."""


@triton.jit
def _merge_kernel(
    states,  # [shards, T, 4]
    labels,  # [T]
    merged,  # [T, 4] out
    logprobs,  # [T] out
    entropies,  # [T] out; None without entropy
    label_stride,
    num_rows,
    ignore_index,
    NUM_SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    label = tl.load(labels + rows * label_stride, mask=inside, other=0).to(tl.int64)
    columns = states + rows * 4
    shard_size = tl.cast(num_rows, tl.int64) * 4
    top = tl.load(columns, mask=inside, other=0.0)
    for shard in tl.static_range(1, NUM_SHARDS):
        m = tl.load(columns + shard * shard_size, mask=inside, other=0.0)
        top = tl.maximum(top, m)
    s = tl.zeros_like(top)
    t = tl.zeros_like(top)
    label_logit = tl.zeros_like(top)
    for shard in tl.static_range(NUM_SHARDS):
        at = columns + shard * shard_size
        m = tl.load(at, mask=inside, other=0.0)
        shard_s = tl.load(at + 1, mask=inside, other=0.0)
        # A shard without a valid column has m = -inf and s = t = 0: shift it by 0, not by -inf.
        shift = tl.where(m == -float("inf"), 0.0, m - top)
        w = tl.exp(shift)
        s += w * shard_s
        t += w * (tl.load(at + 2, mask=inside, other=0.0) + shard_s * shift)
        label_logit += tl.load(at + 3, mask=inside, other=0.0)
    merged += rows * 4
    tl.store(merged, top, mask=inside)
    tl.store(merged + 1, s, mask=inside)
    tl.store(merged + 2, t, mask=inside)
    tl.store(merged + 3, label_logit, mask=inside)
    logprob, entropy = row_outputs(top, s, t, label_logit, label == ignore_index)
    tl.store(logprobs + rows, logprob, mask=inside)
    if entropies is not None:
        tl.store(entropies + rows, entropy, mask=inside)


@traced("trident::merge_row_states", writes=("state", "logprobs", "entropies"))
def _merge_row_states(
    states: Tensor,
    labels: Tensor,
    state: Tensor,
    logprobs: Tensor,
    entropies: Tensor | None,
    ignore_index: int,
) -> None:
    num_shards, num_rows, _ = states.shape
    if not uses_triton(states):
        spec = RowSpec(
            num_valid_vocab=0, ignore_index=ignore_index, with_entropy=entropies is not None
        )
        state.copy_(merge_row_states(states))
        logprob, entropy = logprobs_and_entropy(state, labels, spec)
        logprobs.copy_(logprob)
        if entropies is not None and entropy is not None:
            entropies.copy_(entropy)
        return
    if num_rows > 0:
        with torch.cuda.device_of(states):
            _merge_kernel[(triton.cdiv(num_rows, _BLOCK),)](
                states,
                labels,
                state,
                logprobs,
                entropies,
                labels.stride(0),
                num_rows,
                ignore_index,
                NUM_SHARDS=num_shards,
                BLOCK=_BLOCK,
                num_warps=2,
            )


def write_merged_results(
    results: RowResults, states: Tensor, labels: Tensor, spec: RowSpec
) -> None:
    """Write the results over the whole vocabulary from the states [shards, T, 4], contiguous."""
    _merge_row_states(states, labels, *results, spec.ignore_index)


def merge_row_states(states: Tensor) -> Tensor:
    """State [T, 4] of the whole vocabulary from those of its shards [shards, T, 4], in plain
    torch."""
    m, s, t, label_logit = states.unbind(-1)  # [shards, T] each
    top = m.amax(0)
    # A shard without a valid column has m = -inf and s = t = 0: shift it by 0, not by -inf.
    shift = torch.where(m == -torch.inf, 0.0, m - top)
    w = shift.exp()
    return torch.stack(
        (top, (w * s).sum(0), (w * (t + s * shift)).sum(0), label_logit.sum(0)), dim=-1
    )
