"""The append of keys and values to a paged cache."""

import pytest
import torch

from kernels.append_kv import append_kv, check_caches

HEADS, DIM, BLOCK_SIZE = 3, 20, 8


def test_append_writes_each_token_to_its_slot(backend: str) -> None:
    k_cache, v_cache = torch.randn(2, 20, BLOCK_SIZE, HEADS, DIM)
    # The keys and values of one projection: strided views, as the attention layer hands them over.
    projection = torch.randn(6, HEADS, 3 * DIM)
    k_new, v_new = projection[..., DIM : 2 * DIM], projection[..., 2 * DIM :]
    slots = torch.tensor([3, -1, 17, 100, 101, k_cache.shape[0] * BLOCK_SIZE - 1])
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want_k[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = k_new[token]
            want_v[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = v_new[token]
    append_kv(k_new, v_new, k_cache, v_cache, slots)
    assert torch.equal(k_cache, want_k)
    assert torch.equal(v_cache, want_v)


def test_no_tokens_change_nothing(backend: str) -> None:
    k_cache, v_cache = torch.randn(2, 20, BLOCK_SIZE, HEADS, DIM)
    before = k_cache.clone()
    append_kv(k_cache[0, :0], v_cache[0, :0], k_cache, v_cache, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(k_cache, before)


def test_a_strided_cache_is_refused() -> None:
    k_cache, v_cache = torch.randn(2, 20, BLOCK_SIZE, HEADS, DIM)
    check_caches(k_cache, v_cache)
    with pytest.raises(ValueError, match="contiguous"):
        append_kv(k_cache[0], v_cache[0], k_cache[:, ::2], v_cache, torch.arange(BLOCK_SIZE))
