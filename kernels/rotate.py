"""Rotary positions turn queries and keys, both in one launch that reads each number once.

    out_a = a cos - b sin,   out_b = b cos + a sin     with a = x[i], b = x[i + r/2], i < r/2

The rest of a head, dimensions r and beyond, is copied. Backward is the transpose: sines of the
other sign, of the gradients; nothing of x is kept.

Queries and keys are read where they lie, as columns of the product that made them, and come back
contiguous. Traffic in bf16, bytes an element, planned and not measured: 4 forward and 4 backward.
torch's operations one by one take 18 and some 30: four products, their sums and the joint forward.
Backward they write a whole gradient for every slice, and add these up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import next_power_of_2, num_warps_for, uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_BLOCK = 2048  # elements of the heads of a program


@triton.jit
def _rotate_kernel(
    query_out,  # [T, heads, DIM]
    key_out,  # [T, kv_heads, DIM]
    query,  # [T, heads / members, members, DIM], strided
    key,  # [T, kv_heads, DIM], strided
    cosines,
    sines,  # [T, HALF]
    heads,
    members,
    kv_heads,
    query_parts,
    num_parts,
    query_token_stride,
    query_group_stride,
    query_member_stride,
    key_token_stride,
    key_head_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # One program a token and part: some of its heads of queries, or some of its heads of keys.
    token = (tl.program_id(0) // num_parts).to(tl.int64)
    part = tl.program_id(0) % num_parts
    lane = tl.arange(0, BLOCK_HEADS)
    if part < query_parts:
        head = part * BLOCK_HEADS + lane
        group, member = (head // members).to(tl.int64), (head % members).to(tl.int64)
        in_row = head < heads
        at = token * query_token_stride + group * query_group_stride + member * query_member_stride
        row_x, row_out = query + at, query_out + (token * heads + head) * DIM
    else:
        head = (part - query_parts) * BLOCK_HEADS + lane
        in_row = head < kv_heads
        at = token * key_token_stride + head.to(tl.int64) * key_head_stride
        row_x, row_out = key + at, key_out + (token * kv_heads + head) * DIM
    pair = tl.arange(0, BLOCK_HALF)
    cosine = tl.load(cosines + token * HALF + pair, mask=pair < HALF, other=0.0).to(ACC)[None, :]
    sine = tl.load(sines + token * HALF + pair, mask=pair < HALF, other=0.0).to(ACC)[None, :]
    if INVERSE:
        sine = -sine
    inside = in_row[:, None] & (pair < HALF)[None, :]
    at_x, at_out = row_x[:, None] + pair[None, :], row_out[:, None] + pair[None, :]
    a = tl.load(at_x, mask=inside, other=0.0).to(ACC)
    b = tl.load(at_x + HALF, mask=inside, other=0.0).to(ACC)
    tl.store(at_out, a * cosine - b * sine, mask=inside)
    tl.store(at_out + HALF, b * cosine + a * sine, mask=inside)
    if 2 * HALF < DIM:
        column = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside = in_row[:, None] & (column < DIM)[None, :]
        rest = tl.load(row_x[:, None] + column[None, :], mask=inside)
        tl.store(row_out[:, None] + column[None, :], rest, mask=inside)


@traced("trident::rotate")
def _rotate(
    query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, is_inverse: bool
) -> tuple[Tensor, Tensor]:
    """(query, key), turned and contiguous; backwards where is_inverse."""
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    if len(key) == 0:
        return outputs
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    if query.dim() == 3:
        query = query[:, :, None]
    num_tokens, groups, members, dim = query.shape
    heads, kv_heads, half = groups * members, key.shape[1], cosines.shape[-1]
    block_half = next_power_of_2(half)
    block_heads = max(1, min(_BLOCK // (2 * block_half), next_power_of_2(max(heads, kv_heads))))
    query_parts = triton.cdiv(heads, block_heads)
    num_parts = query_parts + triton.cdiv(kv_heads, block_heads)
    with torch.cuda.device_of(query):
        _rotate_kernel[(num_tokens * num_parts,)](
            *outputs,
            query,
            key,
            cosines.contiguous(),
            sines.contiguous(),
            heads,
            members,
            kv_heads,
            query_parts,
            num_parts,
            *query.stride()[:3],
            *key.stride()[:2],
            DIM=dim,
            HALF=half,
            INVERSE=is_inverse,
            ACC=triton_dtype(accumulation_dtype(query.dtype)),
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            BLOCK_REST=next_power_of_2(dim - 2 * half),
            num_warps=num_warps_for(2 * block_heads * block_half),
        )
    return outputs


@_rotate.register_fake
def _(query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


class _Rotate(torch.autograd.Function):
    """(query, key) to both turned."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _rotate(query, key, cosines, sines, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotate(dquery, dkey, *ctx.saved_tensors, True), None, None


def rotate_reference(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotate` of queries or of keys in plain torch: the specification and the CPU path."""
    if x.dim() == 4:
        cosines, sines = cosines[:, None], sines[:, None]
    half = cosines.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (a * cosines - b * sines, b * cosines + a * sines)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, -1)


def rotate(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """(query, key) with the first r dimensions of their heads turned, in their shapes and dtype.

    query [T, heads, dim] or [T, kv_heads, heads / kv_heads, dim], key [T, kv_heads, dim], both
    strided; cosines and sines [T, 1, r / 2]. Differentiable in query and key.
    """
    if not uses_triton(query):
        return rotate_reference(query, cosines, sines), rotate_reference(key, cosines, sines)
    turned: tuple[Tensor, Tensor] = _Rotate.apply(query, key, cosines, sines)
    return turned
