"""Attention of one new token a sequence over a paged key-value cache in bf16."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Cost,
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    plain,
)
from kernels.decode_attention import decode_attention

_DIM = 128
_NUM_CHECKED = 8


def _batch(sequences: int, context: int, heads: int, block_size: int) -> Size:
    return {
        "sequences": sequences,
        "context": context,
        "heads": heads,
        "block_size": block_size,
    }


# flash-attn 2 wants blocks of 256 tokens; 16 heads of 128 are the 1.3B model, 32 the 6.7B one.
_SIZES = {
    "cuda": [
        _batch(64, 1024, 16, 256),
        _batch(64, 1024, 16, 64),
        _batch(256, 1024, 16, 256),
        _batch(64, 1024, 32, 256),
        _batch(8, 8192, 16, 256),
    ],
    "cpu": [_batch(4, 256, 4, 64), _batch(16, 1024, 4, 64)],
}
# 32 heads over 8 are those of Llama 3's 8B (Grattafiori et al. 2024, Table 3).
_GROUPED_SIZES = {
    "cuda": [_batch(64, 1024, 32, 256) | {"kv_heads": 8}],
    "cpu": [_batch(16, 1024, 8, 64) | {"kv_heads": 2}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    num_sequences, heads, block_size = size["sequences"], size["heads"], size["block_size"]
    blocks_each = -(-size["context"] // block_size)
    num_blocks = num_sequences * blocks_each
    options: Any = {"dtype": torch.bfloat16, "device": device}
    cache = (num_blocks, block_size, size.get("kv_heads", heads), _DIM)
    lengths = torch.randint(size["context"] // 2, size["context"] + 1, (num_sequences,))
    return {
        "query": torch.randn(num_sequences, heads, _DIM, **options),
        "k_cache": torch.randn(cache, **options),
        "v_cache": torch.randn(cache, **options),
        # Blocks in no order, as they come back from finished sequences.
        "block_tables": torch.randperm(num_blocks, device=device)
        .view(num_sequences, blocks_each)
        .int(),
        "context_lengths": lengths.int().to(device),
        "upstream": {},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    query, blocks, lengths = (
        inputs[name][:_NUM_CHECKED] for name in ("query", "block_tables", "context_lengths")
    )
    k_blocks, v_blocks = (inputs[name][blocks.flatten()] for name in ("k_cache", "v_cache"))
    in_order = torch.arange(len(k_blocks), device=query.device).view_as(blocks)
    out = _gathered(query.double(), k_blocks.double(), v_blocks.double(), in_order, lengths)
    rows = torch.arange(len(out), device=out.device)
    return {"out": Expected(out, 0.02, rows, is_relative=True)}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    row_bytes = inputs["k_cache"][0, 0].nbytes
    return Cost(num_bytes=2 * row_bytes * int(inputs["context_lengths"].sum()))


def _ours(*arguments: Tensor) -> Tensor:
    return decode_attention(*arguments, scale=_DIM**-0.5)


def _gathered(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, lengths: Tensor
) -> Tensor:
    """Blocks gathered to [B, kv_heads, longest, dim], then torch's attention with a mask."""
    shape = (len(query), -1, *k_cache.shape[2:])
    keys, values = (x[block_tables].view(shape).transpose(1, 2) for x in (k_cache, v_cache))
    inside = torch.arange(keys.shape[2], device=query.device) < lengths[:, None]
    queries = query.unflatten(1, (keys.shape[1], -1))  # a group's heads as one head's tokens
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=inside[:, None, None])
    return out.flatten(1, 2)


def _flash_attn() -> Any:
    from flash_attn import flash_attn_with_kvcache

    return lambda query, k_cache, v_cache, block_tables, lengths: flash_attn_with_kvcache(
        query[:, None], k_cache, v_cache, cache_seqlens=lengths, block_table=block_tables
    )[:, 0]


DECODE_ATTENTION = Operation(
    name="decode_attention",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("query", "k_cache", "v_cache", "block_tables", "context_lengths"),
    outputs=("out",),
    modes=("forward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("torch, gathered", plain(_gathered)),
        Provider("flash-attn", _flash_attn, needs_gpu=True),
    ),
)

GROUPED_DECODE_ATTENTION = replace(
    DECODE_ATTENTION, name="decode_attention_grouped", sizes=_GROUPED_SIZES
)
