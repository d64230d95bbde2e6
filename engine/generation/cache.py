"""How large the key-value cache is: what memory allows, and no more than the slots can use."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UserError
from engine.ranks.device import free_bytes
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from kernels.decode_attention import SPLIT_TOKENS
from models.paged_attention import PagedCache


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a rollout's cache is made of, before it has memory."""

    layer_numbers: tuple[int, ...]
    """megatron's."""
    num_blocks: int
    block_size: int
    """Tokens."""
    kv_heads: int
    """Of this rank."""
    dim: int
    blocks_per_sequence: int
    """The width of a block table; see table_width."""
    dtype: torch.dtype
    extent_blocks: int = 0
    """Consecutive blocks that each sequence has to itself (extents.py); 0: it takes any, one by
    one."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in one lane: a layer's keys, or its values."""
        return self.block_size * self.kv_heads * self.dim * self.dtype.itemsize

    def build(self, lanes: list[Tensor]) -> PagedCache:
        """Return the cache in these lanes of num_blocks * block_bytes."""
        return PagedCache(
            self.layer_numbers,
            (self.num_blocks, self.block_size, self.kv_heads, self.dim),
            blocks_per_sequence=self.blocks_per_sequence,
            dtype=self.dtype,
            lanes=lanes,
        )


def num_lanes(network: Network) -> int:
    """Return the lanes of a network's cache: keys and values of each of this rank's layers."""
    return 2 * sum(len(module.decoder.layers) for module in network.modules)


def choose_cache(
    network: Network,
    config: SamplingConfig,
    *,
    num_sequences: int,
    max_length: int,
    granularity: int = 1,
) -> CacheShape:
    """Return a cache for num_sequences at once, of max_length tokens each, as far as memory goes.

    Its number of blocks is the same on all ranks of a replica. granularity: what a lane's bytes are
    rounded up to. Raises UserError where there is no room for one sequence of that length.
    """
    parallel, size = network.parallel, network.size
    layers = [layer for module in network.modules for layer in module.decoder.layers]
    kv_heads, dim = size.num_kv_heads // parallel.layout.tp, size.head_dim
    block_bytes = 2 * len(layers) * config.block_size * kv_heads * dim * network.dtype.itemsize
    cache_bytes = config.cache_gib * 2**30
    if not cache_bytes:
        cache_bytes = config.cache_fraction * free_bytes(parallel.device)
        cache_bytes = max(0.0, cache_bytes - 2 * len(layers) * (granularity - 1))
    num_blocks = torch.tensor(int(cache_bytes // block_bytes), device=parallel.device)
    for group in (parallel.tp_group, parallel.pp_group):
        dist.all_reduce(num_blocks, op=dist.ReduceOp.MIN, group=group)
    blocks_per_sequence = math.ceil(max_length / config.block_size)
    num_usable = min(int(num_blocks), num_sequences * blocks_per_sequence)  # sync
    if num_usable < blocks_per_sequence:
        raise UserError(
            f"the key-value cache has room for {num_usable * config.block_size} tokens, and one "
            f"sequence may need {max_length}: raise --sampling.cache-gib or "
            "--sampling.cache-fraction, or lower --sampling.max-new-tokens"
        )
    # A GPU's kernel reads scattered blocks as fast, and its memory is dear.
    has_room = num_usable == num_sequences * blocks_per_sequence
    extent_blocks = blocks_per_sequence if has_room and parallel.device.type == "cpu" else 0
    return CacheShape(
        layer_numbers=tuple(layer.layer_number for layer in layers),
        num_blocks=num_usable,
        block_size=config.block_size,
        kv_heads=kv_heads,
        dim=dim,
        blocks_per_sequence=table_width(max_length, config.block_size),
        dtype=network.dtype,
        extent_blocks=extent_blocks,
    )


def table_width(max_length: int, block_size: int) -> int:
    """Return the width of the block tables of sequences of at most max_length tokens.

    Powers of two of what a program of decode attention reads: CUDA graphs hold the width, and few
    widths let them serve many rollouts. A program whose tokens no sequence has ends at once.
    """
    num_splits = math.ceil(max_length / SPLIT_TOKENS)
    return math.ceil(2 ** (num_splits - 1).bit_length() * SPLIT_TOKENS / block_size)
