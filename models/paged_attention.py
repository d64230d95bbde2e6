"""Attention of generation: keys and values of earlier tokens come from a cache of blocks.

A packed row of T tokens begins with the sequences that decode, one token each; parts of prompts
follow.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.append_kv import append_kv
from kernels.decode_attention import decode_attention
from kernels.decode_groups import DecodeGroups, decode_groups
from models.attention import packed_attention
from models.packed_sequences import PackedSequences


class PagedCache:
    """Keys and values of the layers on this rank, in blocks that any sequence can hold."""

    def __init__(
        self,
        layer_numbers: Iterable[int],
        shape: tuple[int, int, int, int],
        *,
        blocks_per_sequence: int,
        dtype: torch.dtype,
        lanes: Sequence[Tensor],
    ) -> None:
        """shape: [blocks, block_size, kv_heads / tp, dim]; layer_numbers are megatron's. lanes: the
        memory, [bytes] uint8 at least, of each layer's keys and then its values."""
        self.num_blocks, self.block_size = shape[:2]
        self.blocks_per_sequence = blocks_per_sequence
        num_bytes = math.prod(shape) * dtype.itemsize
        parts = [lane[:num_bytes].view(dtype).view(shape) for lane in lanes]
        for part in parts:
            part.zero_()  # what no token was written to is masked, but masked NaN stays NaN
        self._layers = dict(
            zip(layer_numbers, zip(parts[::2], parts[1::2], strict=True), strict=True)
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where every layer's keys and values lie."""
        return tuple(x.data_ptr() for pair in self._layers.values() for x in pair)

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer."""
        return self._layers[layer_number]


@dataclass(kw_only=True)
class PagedSequences(PackedSequences):
    """Where a step's tokens lie in the cache."""

    cache: PagedCache
    slots: Tensor
    """[T] int64: where a token's key and value go, block * block_size + offset; -1: nowhere."""
    block_tables: Tensor
    """[D, blocks_per_sequence] int32: the blocks of the D decoding sequences."""
    context_lengths: Tensor
    """[D] int32: their tokens, the new one included; 0 for an idle one."""
    prompts: PackedSequences | None
    """The parts of prompts in the rest of the row; their keys are those of all tokens so far."""
    prompt_slots: Tensor | None
    """[cu_seqlens_kv[-1]] int64: where these keys lie; None if all parts start at 0."""

    copies: Sequence[tuple[int, int, int]] = ()
    """(first block read, first written, how many): what every layer copies, in this order, between
    writing the new tokens and reading."""
    decode_groups: dict[int | None, DecodeGroups] = field(default_factory=dict, init=False)
    """On the CPU, of each window, made by its first layer for all; whoever changes a length clears
    it."""

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Store key and value [T, kv_heads, dim] and return the attention [T, heads, dim] of query.

        window: how many tokens a token of this layer sees, itself among them; None for all.
        """
        keys, values = self.cache.layer(layer_number)
        append_kv(key, value, keys, values, self.slots)
        for source, target, count in self.copies:
            for lane in (keys, values):
                lane[target : target + count] = lane[source : source + count]
        if self.prompts is None:
            return self._decode(query, keys, values, scale, window)
        num_decodes = len(self.context_lengths)
        if self.prompt_slots is None:
            key, value = key[num_decodes:], value[num_decodes:]
        else:
            key = keys.flatten(0, 1)[self.prompt_slots]
            value = values.flatten(0, 1)[self.prompt_slots]
        out = packed_attention(query[num_decodes:], key, value, self.prompts, scale, window)
        if num_decodes == 0:
            return out
        return torch.cat([self._decode(query[:num_decodes], keys, values, scale, window), out])

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        groups = self.decode_groups.get(window)
        if groups is None and not query.is_cuda:
            groups = decode_groups(keys, self.block_tables, self.context_lengths, window)
            self.decode_groups[window] = groups
        return decode_attention(
            query,
            keys,
            values,
            self.block_tables,
            self.context_lengths,
            scale=scale,
            window=window,
            groups=groups,
        )
