"""New tokens' keys and values go into a paged cache.

cache[slot // block_size, slot % block_size] = new[n]   with slot = slot_mapping[n], if >= 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import next_power_of_2, num_warps_for, uses_triton


@triton.jit
def _append_kernel(
    k_cache,
    v_cache,  # [slots, kv_heads, dim]
    k_new,
    v_new,  # [N, kv_heads, dim], strided
    slot_mapping,  # [N]
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    row_length,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < row_length
    head, element = (column // DIM).to(tl.int64), column % DIM
    if slot >= 0:
        k_at = token * k_token_stride + head * k_head_stride + element
        v_at = token * v_token_stride + head * v_head_stride + element
        at = slot * row_length + column
        tl.store(k_cache + at, tl.load(k_new + k_at, mask=inside), mask=inside)
        tl.store(v_cache + at, tl.load(v_new + v_at, mask=inside), mask=inside)


@torch.library.custom_op("trident::append_kv", mutates_args=("k_cache", "v_cache"))
def _append_kv(
    k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    num_tokens, heads, dim = k_new.shape
    if num_tokens == 0:
        return
    k_new, v_new = (x if x.stride(2) == 1 else x.contiguous() for x in (k_new, v_new))
    block = next_power_of_2(heads * dim)
    with torch.cuda.device_of(k_cache):
        _append_kernel[(num_tokens,)](
            k_cache,
            v_cache,
            k_new,
            v_new,
            slot_mapping.contiguous(),
            *k_new.stride()[:2],
            *v_new.stride()[:2],
            heads * dim,
            DIM=dim,
            BLOCK=block,
            num_warps=num_warps_for(block),
        )


def append_kv_reference(
    k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`append_kv` in plain torch: the specification and the CPU path."""
    is_kept = slot_mapping >= 0
    if not is_kept.all():
        k_new, v_new, slot_mapping = k_new[is_kept], v_new[is_kept], slot_mapping[is_kept]
    slots = slot_mapping.to(torch.int64)
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k_new.to(k_cache.dtype))
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v_new.to(v_cache.dtype))


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise ValueError unless the kernels can read keys and values where they lie."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            "k_cache and v_cache must be contiguous: [blocks, block_size, kv_heads, dim]"
        )


def append_kv(
    k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new tokens' keys and values into the cache, in place.

    k_new, v_new [N, kv_heads, dim]; k_cache, v_cache [blocks, block_size, kv_heads, dim];
    slot_mapping [N] holds block * block_size + offset, or -1 for a token that is not kept.
    """
    check_caches(k_cache, v_cache)
    if uses_triton(k_cache):
        _append_kv(k_new.to(k_cache.dtype), v_new.to(v_cache.dtype), k_cache, v_cache, slot_mapping)
        return
    append_kv_reference(k_new, v_new, k_cache, v_cache, slot_mapping)
