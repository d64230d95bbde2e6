"""How large the key-value cache is: what memory allows, and no more than the slots can use."""

import math

import psutil
import torch
import torch.distributed as dist

from engine.config import UserError
from engine.network import Network
from engine.settings.sampling import SamplingConfig
from models.paged_attention import PagedCache


def build_cache(
    network: Network, config: SamplingConfig, *, num_sequences: int, max_length: int
) -> PagedCache:
    """Return a cache for num_sequences at once, of max_length tokens each, as far as memory goes.

    Its number of blocks is the same on all ranks of a replica. Raises UserError where there is no
    room for one sequence of that length.
    """
    parallel, size = network.parallel, network.size
    layers = [layer for module in network.modules for layer in module.decoder.layers]
    heads, dim = size.num_heads // parallel.layout.tp, size.hidden_size // size.num_heads
    block_bytes = 2 * len(layers) * config.block_size * heads * dim * network.dtype.itemsize
    cache_bytes = config.cache_gib * 2**30
    if not cache_bytes:
        cache_bytes = config.cache_fraction * free_bytes(parallel.device)
    num_blocks = torch.tensor(int(cache_bytes // block_bytes), device=parallel.device)
    for group in (parallel.tp_group, parallel.pp_group):
        dist.all_reduce(num_blocks, op=dist.ReduceOp.MIN, group=group)
    blocks_per_sequence = math.ceil(max_length / config.block_size)
    num_usable = min(int(num_blocks), num_sequences * blocks_per_sequence)  # sync
    if num_usable < blocks_per_sequence:
        raise UserError(
            f"the key-value cache has room for {num_usable * config.block_size} tokens, and one "
            f"sequence may need {max_length}: raise sampling.cache_gib or cache_fraction, or lower "
            "max_new_tokens"
        )
    return PagedCache(
        [layer.layer_number for layer in layers],
        (num_usable, config.block_size, heads, dim),
        blocks_per_sequence=blocks_per_sequence,
        dtype=network.dtype,
        device=parallel.device,
    )


def free_bytes(device: torch.device) -> int:
    """Return the memory that a cache could take on this device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
