"""Attention of one new token a sequence over a paged key-value cache.

    out[b, h] = softmax(scale * q[b, h] . K[b, :, g]) V[b, :, g]   over context_lengths[b] tokens

g = h // (heads / kv_heads): a group of query heads shares a key-value head (Ainslie et al. 2023).
With a window only the last `window` of the tokens count, the new one among them. Token n of
sequence b lies in block block_tables[b, n // block_size] at n % block_size.

A context is cut into splits of a fixed length, each with its own softmax, merged in order.
The cut depends on the context alone, so the batch around a sequence changes no bit of its output.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.append_kv import check_caches
from kernels.decode_groups import DecodeGroups, decode_attention_reference, decode_groups
from kernels.launch import next_power_of_2, uses_triton
from kernels.traced import traced

SPLIT_TOKENS = 256  # tokens of context a program attends to
_BLOCK_TOKENS = 64  # of them at a time, where their keys fit
# Of keys at a time. Values take as much, and both again for the loads of the next round: 128 KiB of
# the shared memory that a program has, 163 on an A100 and 227 on an H100.
_TILE_BYTES = 2**15
# Query heads of one key-value head that a program takes, as many as a matrix unit has rows; of
# numbers of two bytes twice that, if there are so many. A larger group is read more than once.
_GROUP_HEADS = 16


@triton.jit
def _extent(context_lengths, sequence, split, window, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """(first token, one beyond the last, tokens of the context) of a split. The tables have room
    for more than most contexts need: a split beyond the context ends before it begins."""
    length = tl.load(context_lengths + sequence).to(tl.int32)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    if window is not None:
        start = tl.maximum(start, (length - window) // BLOCK * BLOCK)
    return start, end, length


@triton.jit
def _slots(table, first, end, length, window, BLOCK_SIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """(slots in the cache, which of them are seen) of a split's next BLOCK_TOKENS tokens."""
    token = first + tl.arange(0, BLOCK_TOKENS)
    inside = token < end
    if window is not None:
        inside = inside & (token >= length - window)
    block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block * BLOCK_SIZE + token % BLOCK_SIZE, inside


@triton.jit
def _split_kernel(
    partial_out,  # [B, heads, splits, DIM] unnormalised
    partial_state,  # [B, heads, splits, 2] maximum and sum
    query,  # [B, heads, dim]
    k_cache,
    v_cache,  # [blocks, block_size, heads, dim]
    block_tables,  # [B, max_blocks]
    context_lengths,  # [B]
    scale,
    window,
    heads,
    num_splits,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # One program a sequence, head and split: row = (sequence * heads + head) * splits + split.
    row = tl.program_id(0).to(tl.int64)
    split = (row % num_splits).to(tl.int32)
    head = (row // num_splits) % heads
    sequence = row // num_splits // heads
    start, end, length = _extent(context_lengths, sequence, split, window, SPLIT, BLOCK_TOKENS)
    if start < end:
        column = tl.arange(0, BLOCK_DIM)
        in_dim = column < DIM
        q = tl.load(query + (sequence * heads + head) * DIM + column, mask=in_dim, other=0.0)
        q = q.to(tl.float32) * scale
        maximum = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        out = tl.zeros((BLOCK_DIM,), tl.float32)
        table = block_tables + sequence * max_blocks
        for first in tl.range(start, end, BLOCK_TOKENS, num_stages=3):
            slot, inside = _slots(table, first, end, length, window, BLOCK_SIZE, BLOCK_TOKENS)
            at = ((slot * heads + head) * DIM)[:, None] + column[None, :]
            wanted = inside[:, None] & in_dim[None, :]
            # All before the first is used: one wait for the memory instead of three.
            k = tl.load(k_cache + at, mask=wanted, other=0.0)
            v = tl.load(v_cache + at, mask=wanted, other=0.0)
            # One query a head: a product and a sum; there is no second query for a matrix unit.
            logit = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
            logit = tl.where(inside, logit, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(logit))
            decay = tl.exp(maximum - new_maximum)
            weight = tl.exp(logit - new_maximum)
            out = out * decay + tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
            total = total * decay + tl.sum(weight)
            maximum = new_maximum
        tl.store(partial_out + row * BLOCK_DIM + column, out)
        tl.store(partial_state + 2 * row, maximum)
        tl.store(partial_state + 2 * row + 1, total)


@triton.jit
def _product(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # numpy has no bf16: the interpreter would multiply its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _group_split_kernel(
    partial_out,  # [B, heads, splits, DIM] unnormalised
    partial_state,  # [B, heads, splits, 2] maximum and sum
    query,  # [B, heads, dim]
    k_cache,
    v_cache,  # [blocks, block_size, heads / GROUP, dim]
    block_tables,  # [B, max_blocks]
    context_lengths,  # [B]
    scale,
    window,
    heads,
    num_splits,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # One program a sequence, key-value head, BLOCK_GROUP of its query heads and split.
    PARTS: tl.constexpr = (GROUP + BLOCK_GROUP - 1) // BLOCK_GROUP
    program = tl.program_id(0).to(tl.int64)
    split = (program % num_splits).to(tl.int32)
    part = program // num_splits % PARTS
    kv_heads = heads // GROUP
    kv_head = program // num_splits // PARTS % kv_heads
    sequence = program // num_splits // PARTS // kv_heads
    start, end, length = _extent(context_lengths, sequence, split, window, SPLIT, BLOCK_TOKENS)
    if start < end:
        column = tl.arange(0, BLOCK_DIM)
        in_dim = column < DIM
        member = part * BLOCK_GROUP + tl.arange(0, BLOCK_GROUP)
        in_group = member < GROUP
        row = sequence * heads + kv_head * GROUP + member
        in_query = in_group[:, None] & in_dim[None, :]
        q = tl.load(query + row[:, None] * DIM + column[None, :], mask=in_query, other=0.0)
        q = q.to(k_cache.dtype.element_ty)
        maximum = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_GROUP,), tl.float32)
        out = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
        table = block_tables + sequence * max_blocks
        for first in tl.range(start, end, BLOCK_TOKENS, num_stages=3):
            slot, inside = _slots(table, first, end, length, window, BLOCK_SIZE, BLOCK_TOKENS)
            at = ((slot * kv_heads + kv_head) * DIM)[:, None] + column[None, :]
            wanted = inside[:, None] & in_dim[None, :]
            k = tl.load(k_cache + at, mask=wanted, other=0.0)
            v = tl.load(v_cache + at, mask=wanted, other=0.0)
            logit = _product(q, tl.trans(k), INTERPRETED) * scale
            logit = tl.where(inside[None, :], logit, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(logit, axis=1))
            decay = tl.exp(maximum - new_maximum)
            weight = tl.exp(logit - new_maximum[:, None])
            out = out * decay[:, None] + _product(weight.to(v.dtype), v, INTERPRETED)
            total = total * decay + tl.sum(weight, axis=1)
            maximum = new_maximum
        at_row = row * num_splits + split
        at_out = at_row[:, None] * BLOCK_DIM + column[None, :]
        tl.store(partial_out + at_out, out, mask=in_group[:, None])
        tl.store(partial_state + 2 * at_row, maximum, mask=in_group)
        tl.store(partial_state + 2 * at_row + 1, total, mask=in_group)


@triton.jit
def _merge_kernel(
    out,  # [B, heads, dim]
    partial_out,
    partial_state,  # of the splits that a context reaches; the others hold nothing
    context_lengths,  # [B]
    window,
    heads,
    num_splits,
    dim,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    start = split * SPLIT
    length = tl.load(context_lengths + row // heads)
    inside = start < length
    if window is not None:
        inside = inside & (start + SPLIT > length - window)
    column = tl.arange(0, BLOCK_DIM)
    state = partial_state + 2 * (row * num_splits + split)
    maximum = tl.load(state, mask=inside, other=float("-inf"))
    total = tl.load(state + 1, mask=inside, other=0.0)
    best = tl.max(maximum)
    # An idle slot has no maximum: its weights are exp(-inf - 0) = 0, and so is its output.
    weight = tl.exp(maximum - tl.where(best == float("-inf"), 0.0, best))
    at = (row * num_splits + split)[:, None] * BLOCK_DIM + column[None, :]
    parts = tl.load(partial_out + at, mask=inside[:, None], other=0.0)
    numerator = tl.sum(parts * weight[:, None], axis=0)
    denominator = tl.sum(total * weight)
    result = numerator / tl.where(denominator == 0, 1.0, denominator)
    tl.store(out + row * dim + column, result, mask=column < dim)


@traced("trident::decode_attention")
def _decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    batch, heads, dim = query.shape
    block_size, max_blocks = k_cache.shape[1], block_tables.shape[1]
    out = query.new_empty(batch, heads, dim)
    num_splits = max(1, triton.cdiv(max_blocks * block_size, SPLIT_TOKENS))
    block_dim, rows = max(16, next_power_of_2(dim)), batch * heads  # no product is narrower
    if rows == 0:
        return out
    partial_out = query.new_empty(rows, num_splits, block_dim, dtype=torch.float32)
    partial_state = query.new_empty(rows, num_splits, 2, dtype=torch.float32)
    context_lengths = context_lengths.contiguous()
    with torch.cuda.device_of(query):
        split_kernel, num_programs, shape = _split_for(heads // k_cache.shape[2], rows, k_cache)
        split_kernel[(num_programs * num_splits,)](
            partial_out,
            partial_state,
            query.contiguous(),
            k_cache,
            v_cache,
            block_tables.contiguous(),
            context_lengths,
            scale,
            window,
            heads,
            num_splits,
            max_blocks,
            BLOCK_SIZE=block_size,
            DIM=dim,
            SPLIT=SPLIT_TOKENS,
            BLOCK_DIM=block_dim,
            **shape,
        )
        _merge_kernel[(rows,)](
            out,
            partial_out,
            partial_state,
            context_lengths,
            window,
            heads,
            num_splits,
            dim,
            SPLIT=SPLIT_TOKENS,
            SPLITS=next_power_of_2(num_splits),
            BLOCK_DIM=block_dim,
            num_warps=1,
        )
    return out


def _split_for(group: int, rows: int, k_cache: Tensor) -> tuple[Any, int, dict[str, int]]:
    """Return the kernel of `group` query heads a key-value head, its programs a split for rows
    queries, and how each is shaped."""
    num_bytes = k_cache.element_size()
    token_bytes = next_power_of_2(k_cache.shape[3]) * num_bytes
    if group == 1:
        block_tokens = min(_BLOCK_TOKENS, _TILE_BYTES // token_bytes)
        return _split_kernel, rows, {"BLOCK_TOKENS": block_tokens, "num_warps": 4}
    # fp32 takes three products of TF32, whose parts fill the registers.
    tile_bytes = _TILE_BYTES // (2 if num_bytes == 4 else 1)
    heads = _GROUP_HEADS * (2 if group > _GROUP_HEADS and num_bytes == 2 else 1)
    shape = {
        "BLOCK_TOKENS": min(_BLOCK_TOKENS, max(16, tile_bytes // token_bytes)),
        "GROUP": group,
        "BLOCK_GROUP": heads,
        "INTERPRETED": not isinstance(_group_split_kernel, triton.JITFunction),
        "num_warps": 8 if token_bytes > 512 else 4,
    }
    return _group_split_kernel, rows // group * triton.cdiv(group, heads), shape


@_decode_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    groups: DecodeGroups | None = None,
) -> Tensor:
    """[B, heads, dim] attention of one query a sequence over its cached tokens.

    query [B, heads, dim]; caches [blocks, block_size, kv_heads, dim], heads a multiple of kv_heads;
    block_tables [B, max_blocks] int32, read only as far as the context reaches; context_lengths [B]
    int32, the new token included. A length of 0 (an idle slot) gives zeros. window: how many of the
    last tokens are seen; None for all. groups: what `decode_groups` made of tables, lengths and
    window, to spare the CPU path the work.
    """
    check_caches(k_cache, v_cache)
    heads, kv_heads = query.shape[1], k_cache.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key-value heads")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens shows a token nothing, not even itself")
    if uses_triton(query):
        return _decode_attention(
            query, k_cache, v_cache, block_tables, context_lengths, scale, window
        )
    if groups is None:
        groups = decode_groups(k_cache, block_tables, context_lengths, window)
    return decode_attention_reference(query, k_cache, v_cache, groups, scale=scale)
