"""What a step is on the device, and how a decoding step becomes the next without the host."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.generation.scheduler import Step
from engine.generation.sequence import LiveSequence
from models.packed_sequences import PackedSequences
from models.paged_attention import PagedCache, PagedSequences

IDLE_TOKEN = -1


@dataclass(kw_only=True)
class StepTensors:
    """A step of T tokens, of which R sample the next one; in a decoding step all T rows do."""

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0 in every sequence."""
    paged: PagedSequences
    rows: Tensor
    """[R] int64: the tokens after which one is sampled."""
    sample_index: Tensor
    """[R] int64."""
    first_stop: Tensor
    """[R] int64: stop tokens are drawn from this position on (min_new_tokens)."""
    last_position: Tensor
    """[R] int64: nothing is drawn beyond this position."""
    is_idle: Tensor
    """[R] bool: the row's sequence has ended, or it never had one."""

    def advance(self, sampled: Tensor, stop_tokens: Tensor) -> None:
        """Make a decoding step the one that feeds the tokens [R] just sampled, in place.

        A row whose token was its sequence's last becomes idle.
        """
        paged, block_size = self.paged, self.paged.cache.block_size
        has_stopped = (sampled[:, None] == stop_tokens).any(1)
        self.is_idle |= has_stopped | (self.positions + 1 >= self.last_position)
        self.tokens.copy_(sampled.masked_fill(self.is_idle, 0))
        self.positions += ~self.is_idle
        column = self.positions // block_size
        block = paged.block_tables.gather(1, column[:, None])[:, 0]
        cache_slots = block * block_size + self.positions % block_size
        paged.slots.copy_(cache_slots.masked_fill_(self.is_idle, -1))
        paged.context_lengths.copy_((self.positions + 1).masked_fill_(self.is_idle, 0))
        paged.decode_groups.clear()

    def clone(self) -> "StepTensors":
        """Return a decoding step of the same contents that shares no tensor with this one."""
        paged = dataclasses.replace(
            self.paged,
            slots=self.paged.slots.clone(),
            block_tables=self.paged.block_tables.clone(),
            context_lengths=self.paged.context_lengths.clone(),
        )
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        copies = {name: x.clone() for name, x in mine.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, paged=paged, **copies)

    def buffers(self) -> list[Tensor]:
        """Return a decoding step's tensors, in a fixed order."""
        mine = [getattr(self, field.name) for field in dataclasses.fields(self)]
        paged = [self.paged.slots, self.paged.block_tables, self.paged.context_lengths]
        return [x for x in mine if isinstance(x, Tensor)] + paged


def upload(
    step: Step,
    cache: PagedCache,
    *,
    num_decode_rows: int,
    min_new_tokens: int,
    device: torch.device,
) -> StepTensors:
    """Return a step's tensors: decoding sequences, idle rows up to num_decode_rows, prefills."""
    sampled = step.sampled
    num_tokens = num_decode_rows + sum(part.stop - part.start for part in step.prefills)
    tokens = np.zeros(num_tokens, dtype=np.int64)
    positions = np.zeros(num_tokens, dtype=np.int64)
    cache_slots = np.full(num_tokens, -1, dtype=np.int64)
    context_lengths = np.zeros(num_decode_rows, dtype=np.int32)
    num_decodes = len(step.decodes)
    tokens[:num_decodes] = [sequence.tokens[-1] for sequence in step.decodes]
    positions[:num_decodes] = [sequence.num_cached for sequence in step.decodes]
    context_lengths[:num_decodes] = [len(sequence.tokens) for sequence in step.decodes]
    block_tables = _block_tables(step, num_decode_rows, cache.blocks_per_sequence)
    block, offset = np.divmod(positions[:num_decodes], cache.block_size)
    first_slots = block_tables[np.arange(num_decodes), block] * cache.block_size
    cache_slots[:num_decodes] = first_slots + offset
    rows = list(range(num_decodes if step.prefills else num_decode_rows))
    end = num_decode_rows
    for part in step.prefills:
        start, end = end, end + part.stop - part.start
        tokens[start:end] = part.sequence.tokens[part.start : part.stop]
        positions[start:end] = np.arange(part.start, part.stop)
        cache_slots[start:end] = _cache_slots(part.sequence, part.stop, cache)[part.start :]
        if part.is_last:
            rows.append(end - 1)
    per_row = np.zeros((3, len(rows)), dtype=np.int64)
    per_row[0, : len(sampled)] = [s.sample_index for s in sampled]
    per_row[1, : len(sampled)] = [s.prompt_length + min_new_tokens for s in sampled]
    per_row[2, : len(sampled)] = [s.max_length - 1 for s in sampled]
    sample_index, first_stop, last_position = _to(device, per_row)
    prompts, prompt_slots = _prefill_keys(step, cache, device)
    return StepTensors(
        tokens=_to(device, tokens),
        positions=_to(device, positions),
        paged=PagedSequences(
            cache=cache,
            slots=_to(device, cache_slots),
            block_tables=_to(device, block_tables),
            context_lengths=_to(device, context_lengths),
            prompts=prompts,
            prompt_slots=prompt_slots,
            copies=step.copies,
        ),
        rows=_to(device, np.array(rows, dtype=np.int64)),
        sample_index=sample_index,
        first_stop=first_stop,
        last_position=last_position,
        is_idle=_to(device, np.arange(len(rows)) >= len(sampled)),
    )


def _block_tables(step: Step, num_rows: int, width: int) -> np.ndarray:
    """[num_rows, width] int32: the blocks of the decoding sequences, 0 beyond."""
    tables = np.zeros((num_rows, width), dtype=np.int32)
    counts = np.zeros(num_rows, dtype=np.int64)
    counts[: len(step.decodes)] = [len(sequence.blocks) for sequence in step.decodes]
    blocks = itertools.chain.from_iterable(sequence.blocks for sequence in step.decodes)
    tables[np.arange(width) < counts[:, None]] = np.fromiter(blocks, np.int32, counts.sum())
    return tables


def _prefill_keys(
    step: Step, cache: PagedCache, device: torch.device
) -> tuple[PackedSequences | None, Tensor | None]:
    """Return where the prefills and their keys begin and end, and the keys' cache slots if any key
    is older than the step."""
    if not step.prefills:
        return None, None
    lengths = [part.stop - part.start for part in step.prefills]
    bounds = _to(device, np.cumsum([0, *lengths], dtype=np.int32))
    sequences = PackedSequences.of(bounds, max(lengths))
    if all(part.start == 0 for part in step.prefills):
        return sequences, None
    key_lengths = [part.stop for part in step.prefills]
    sequences.cu_seqlens_kv = _to(device, np.cumsum([0, *key_lengths], dtype=np.int32))
    sequences.max_seqlen_kv = max(key_lengths)
    slots = [_cache_slots(part.sequence, part.stop, cache) for part in step.prefills]
    return sequences, _to(device, np.concatenate(slots))


def _cache_slots(sequence: LiveSequence, length: int, cache: PagedCache) -> np.ndarray:
    """Return the cache slots of a sequence's first `length` tokens."""
    size = cache.block_size
    blocks = np.array(sequence.blocks[: math.ceil(length / size)], dtype=np.int64)
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)[:length]


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    """Return the array on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
