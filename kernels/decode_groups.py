"""Decode attention on the CPU: a batch in few calls of torch's attention, read where it lies.

Sequences whose blocks are runs, one like the other at equal distances, are a strided view of the
cache. One call attends to all of them without a copy. Any other sequence is gathered first.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What another call costs, in tokens of one sequence and layer that could be attended to instead:
# 8.5 us against 0.19 us a token (4 heads of 64, fp32, one core of a Xeon of 2023, keys and values
# not in its cache). Our choice; wider models only make padding dearer, and lengths more uneven.
# A gather costs 0.15 to 0.2 us a token more than reading in place: no run of blocks is gathered.
_CALL_TOKENS = 45
# Keys of one group of sequences that are gathered: small enough to stay in a core's cache.
_GROUP_BYTES = 1 << 21


class View(NamedTuple):
    """Sequences of like length at equal distances in the cache."""

    num_rows: int
    """Sequences."""
    start: int
    """The slot of the first one's first token."""
    stride: int
    """Slots from one to the next."""
    length: int
    """Tokens of the longest."""
    bias: Tensor | None
    """[num_rows, 1, 1, length] 0 for what a sequence sees, else -inf; None: all see everything."""

    def of(self, cache: Tensor) -> Tensor:
        """[num_rows, kv_heads, length, dim] of a cache [blocks, block_size, kv_heads, dim]."""
        heads, dim = cache.shape[2:]
        width = heads * dim
        return cache.as_strided(
            (self.num_rows, heads, self.length, dim),
            (self.stride * width, dim, width, 1),
            cache.storage_offset() + self.start * width,
        )


class Gather(NamedTuple):
    """Sequences of like length that lie scattered."""

    num_rows: int
    blocks: Tensor
    """[num_rows * blocks of the longest] their blocks, one sequence after the other."""
    bias: Tensor
    """[num_rows, 1, 1, tokens of these blocks] 0 for what the sequence sees, else -inf."""

    def of(self, cache: Tensor) -> Tensor:
        """[num_rows, kv_heads, tokens, dim] copied from a cache [blocks, block_size, kv_heads,
        dim]."""
        taken = cache.view(len(cache), -1).index_select(0, self.blocks)
        return taken.view(self.num_rows, -1, *cache.shape[2:]).transpose(1, 2)


class DecodeGroups(NamedTuple):
    """How the CPU path deals with a batch; the layers of a model can share it."""

    order: Tensor | None
    """[busy] int64, the sequences that are not idle, as the groups have them; None: the batch."""
    counts: list[int]
    """Sequences of each group."""
    groups: list[View | Gather]


def decode_groups(
    k_cache: Tensor, block_tables: Tensor, context_lengths: Tensor, window: int | None = None
) -> DecodeGroups:
    """Cut a batch into groups: k_cache [blocks, block_size, kv_heads, dim], block_tables [B,
    max_blocks] and context_lengths [B] as `decode_attention` has them, on the CPU."""
    block_size = k_cache.shape[1]
    tables, lengths = block_tables.numpy(), context_lengths.numpy()
    if window is not None:
        tables, lengths = _within_reach(tables, lengths, block_size, window)
    num_blocks = -(-lengths // block_size)
    column = np.arange(num_blocks.max(initial=0))
    follows = tables[:, : len(column)] == tables[:, :1] + column
    is_run = (follows | (column >= num_blocks[:, None])).all(1)
    runs, rest = np.flatnonzero(is_run & (lengths > 0)), np.flatnonzero(~is_run)
    runs = runs[tables[runs, 0].argsort(kind="stable")]
    rest = rest[lengths[rest].argsort(kind="stable")]
    order = np.concatenate([runs, rest])
    is_batch = len(order) == len(lengths) and bool((order[1:] > order[:-1]).all())
    bounds = np.append(tables[runs, 0].astype(np.int64), len(k_cache)) * block_size
    groups: list[View | Gather] = _views(bounds, lengths[runs], window, k_cache.dtype)
    groups += _gathers(tables[rest], lengths[rest], window, k_cache)
    return DecodeGroups(
        None if is_batch else torch.from_numpy(order), [group.num_rows for group in groups], groups
    )


def _within_reach(
    tables: np.ndarray, lengths: np.ndarray, block_size: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tables and lengths without the blocks that lie whole before the windows."""
    num_passed = (lengths - window).clip(0) // block_size
    column = (num_passed[:, None] + np.arange(tables.shape[1])).clip(max=tables.shape[1] - 1)
    return np.take_along_axis(tables, column, 1), lengths - num_passed * block_size


def decode_attention_reference(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, groups: DecodeGroups, *, scale: float
) -> Tensor:
    """`decode_attention` in plain torch: the specification and the CPU path."""
    order, counts, _ = groups
    if not counts:
        return torch.zeros_like(query)
    busy = query if order is None else query[order]
    # The queries of a key-value head see the same keys, as if they were tokens of one sequence.
    busy = busy.unflatten(1, (k_cache.shape[2], -1))  # [busy, kv_heads, heads / kv_heads, dim]
    parts = [
        F.scaled_dot_product_attention(
            part, group.of(k_cache), group.of(v_cache), attn_mask=group.bias, scale=scale
        )
        for part, group in zip(busy.split(counts), groups.groups, strict=True)
    ]
    out = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)
    return out if order is None else torch.zeros_like(query).index_copy_(0, order, out)


def _views(
    bounds: np.ndarray, lengths: np.ndarray, window: int | None, dtype: torch.dtype
) -> list[View | Gather]:
    """Cut runs of lengths [n] into views. bounds [n + 1]: their first slots, ascending, and the
    cache's end.

    The next run joins a view where the tokens attended to in vain cost less than a call. They are
    its own, or those that its length adds to the others. A view over a gap would attend to a whole
    sequence in vain, so that gaps part views. No view reaches into the next run or beyond the
    cache: what is masked is read too, and a NaN there would not stay in its sequence.
    """
    num_tokens, first_slots = lengths.tolist(), bounds.tolist()
    most = max(num_tokens, default=0)
    seen = most if window is None else window
    is_alike = min(num_tokens, default=0) == most
    bias = None if is_alike and most <= seen else _bias(lengths, most, window, dtype)
    views: list[View | Gather] = []
    begin, total = 0, len(num_tokens)
    while begin < total:
        first, longest, is_even = first_slots[begin], num_tokens[begin], True
        end = begin + 1
        stride = first_slots[end] - first
        while end < total and first_slots[end] - first_slots[end - 1] == stride:
            length, room = num_tokens[end], first_slots[end + 1] - first_slots[end]
            wider = max(longest, length)
            padding = (wider - longest) * (end - begin) + wider - length
            if padding > _CALL_TOKENS or wider > min(stride, room):
                break
            is_even &= length == longest
            longest, end = wider, end + 1
        is_whole = is_even and longest <= seen
        masks = None if is_whole or bias is None else bias[begin:end, :, :, :longest]
        views.append(View(end - begin, first, stride, longest, masks))
        begin = end
    return views


def _gathers(
    tables: np.ndarray, lengths: np.ndarray, window: int | None, k_cache: Tensor
) -> list[View | Gather]:
    """Cut scattered sequences, by ascending length, into groups whose keys a core's cache holds."""
    block_size, token_bytes = k_cache.shape[1], k_cache[0, 0].nbytes
    num_tokens = lengths.tolist()
    groups: list[View | Gather] = []
    begin = 0
    while begin < len(num_tokens):
        # The group ends where its longest member would overflow the cache.
        end = begin + 1
        while end < len(num_tokens) and (
            (end + 1 - begin) * num_tokens[end] * token_bytes <= _GROUP_BYTES
        ):
            end += 1
        num_blocks = -(-num_tokens[end - 1] // block_size)
        blocks = torch.from_numpy(tables[begin:end, :num_blocks].reshape(-1))
        bias = _bias(lengths[begin:end], num_blocks * block_size, window, k_cache.dtype)
        groups.append(Gather(end - begin, blocks, bias))
        begin = end
    return groups


def _bias(lengths: np.ndarray, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, 1, 1, width]: 0 for the last `window` tokens of sequences of lengths [n], else -inf."""
    column, ends = np.arange(width), lengths[:, None]
    is_outside = column >= ends
    if window is not None:
        is_outside |= column < ends - window
    bias = np.where(is_outside, np.float32(-np.inf), np.float32(0))
    return torch.from_numpy(bias).to(dtype)[:, None, None]
