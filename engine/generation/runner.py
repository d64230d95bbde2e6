"""How a step runs on this rank: the tensors of a step, the forward passes, sampling, the pipeline's messages."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import UserError
from engine.generation.scheduler import Step
from engine.generation.sequence import LiveSequence, SamplingConfig
from engine.network import Network
from models.attention import PackedSequences
from models.paged_attention import PagedCache, PagedSequences
from models.vocab_parallel import vocab_parallel_sample

IDLE_TOKEN = -1


@dataclass(kw_only=True)
class StepTensors:
    """A step on the device: T tokens, of which R rows sample. A decoding step updates them in place."""

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0 in every sequence."""
    paged: PagedSequences
    rows: Tensor
    """[R] int64: the tokens after which one is sampled; all T of them in a decoding step."""
    sample_index: Tensor
    """[R] int64."""
    first_stop: Tensor
    """[R] int64: stop tokens are drawn from this position on (min_new_tokens)."""
    last_position: Tensor
    """[R] int64: no token is drawn beyond this position."""
    is_idle: Tensor
    """[R] bool: finished, or no sequence at all."""


@dataclass(kw_only=True)
class Flight:
    """A step on its way through the pipeline."""

    step: Step
    tensors: StepTensors
    sampled: Tensor
    """[num_steps, 2, R] int32: tokens (IDLE_TOKEN after the end) and the bits of their fp32 log-probs."""
    reply: dist.Work | None = None


class Runner:
    """Runs the steps of one generate() call; holds its cache.

    Every rank of a replica makes the same calls in the same order.
    """

    def __init__(
        self,
        network: Network,
        config: SamplingConfig,
        *,
        stop_ids: frozenset[int],
        seed: int,
        max_length: int,
        num_sequences: int,
    ) -> None:
        self.network = network
        self.config = config
        self.seed = seed
        self.parallel = network.parallel
        self.device = network.parallel.device
        self.stop_tokens = torch.tensor(sorted(stop_ids), device=self.device)
        self.blocks_per_sequence = math.ceil(max_length / config.block_size)
        self.num_blocks = self._num_blocks(num_sequences)
        layer_numbers = [
            layer.layer_number for module in network.modules for layer in module.decoder.layers
        ]
        self.cache = PagedCache(
            layer_numbers, (self.num_blocks, *self._block_shape()), self._weight()
        )
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Start a step: upload it and run this rank's first pipeline chunk, num_steps times over without pipeline."""
        tensors = self._upload(step)
        num_rows = len(tensors.rows)
        sampled = torch.empty(step.num_steps, 2, num_rows, dtype=torch.int32, device=self.device)
        flight = Flight(step=step, tensors=tensors, sampled=sampled)
        for n in range(step.num_steps):
            if n > 0:
                self._advance(tensors, sampled[n - 1, 0])
            self._run_chunk(flight, 0, n)
        return flight

    @torch.inference_mode()
    def proceed(self, flight: Flight, virtual_stage: int) -> None:
        """Run one of this rank's later pipeline chunks on a step."""
        self._run_chunk(flight, virtual_stage, 0)

    def collect(self, flight: Flight) -> list[tuple[list[int], list[float]]]:
        """Wait for a step and return (tokens, logprobs) of each of its sampled sequences.

        Raises FloatingPointError when logits were not finite.
        """
        if flight.reply is not None:
            flight.reply.wait()
        sampled = flight.sampled.cpu().numpy()  # sync
        tokens, logprobs = sampled[:, 0], sampled[:, 1].view(np.float32)
        outcome = []
        for row, sequence in enumerate(flight.step.sampled):
            num_tokens = int((tokens[:, row] != IDLE_TOKEN).sum())
            if not np.isfinite(logprobs[:num_tokens, row]).all():
                raise FloatingPointError(
                    f"the logits of sample {sequence.sample_index} are not finite after "
                    f"{len(sequence.tokens)} tokens: the weights hold NaN or infinity"
                )
            outcome.append((tokens[:num_tokens, row].tolist(), logprobs[:num_tokens, row].tolist()))
        return outcome

    def _weight(self) -> Tensor:
        return next(self.network.modules[0].parameters())

    def _block_shape(self) -> tuple[int, int, int]:
        size = self.network.size
        heads = size.num_heads // self.parallel.layout.tp
        return self.config.block_size, heads, size.hidden_size // size.num_heads

    def _num_blocks(self, num_sequences: int) -> int:
        """Return the blocks of the cache: what memory allows on the fullest rank, at most what the slots can use."""
        num_layers = sum(len(module.decoder.layers) for module in self.network.modules)
        block_bytes = (
            2 * num_layers * math.prod(self._block_shape()) * self._weight().element_size()
        )
        if self.config.cache_gib:
            cache_bytes = self.config.cache_gib * 2**30
        else:
            cache_bytes = self.config.cache_fraction * free_bytes(self.device)
        fit = torch.tensor(int(cache_bytes // block_bytes), device=self.device)
        for group in (self.parallel.tp_group, self.parallel.pp_group):
            dist.all_reduce(fit, op=dist.ReduceOp.MIN, group=group)
        most_used = min(self.config.num_slots, num_sequences) * self.blocks_per_sequence
        num_blocks = min(int(fit), most_used)  # sync
        if num_blocks < self.blocks_per_sequence:
            raise UserError(
                f"the key-value cache has room for {num_blocks * self.config.block_size} tokens, too few for one "
                f"sequence of {self.blocks_per_sequence * self.config.block_size}: raise sampling.cache_gib or "
                "cache_fraction, or lower max_new_tokens"
            )
        return num_blocks

    def _upload(self, step: Step) -> StepTensors:
        """Lay a step out as tensors: the decoding sequences, idle rows up to a multiple of tp, the chunks."""
        num_chunk_tokens = sum(chunk.stop - chunk.start for chunk in step.chunks)
        num_decodes = len(step.decodes)
        multiple = self.parallel.layout.tp if self.parallel.layout.sequence_parallel else 1
        num_idle = -(num_decodes + num_chunk_tokens) % multiple
        first_chunk = num_decodes + num_idle
        tokens = np.zeros(first_chunk + num_chunk_tokens, dtype=np.int64)
        positions = np.zeros_like(tokens)
        slots = np.full_like(tokens, -1)
        tables = np.zeros((first_chunk, self.blocks_per_sequence), dtype=np.int32)
        context_lengths = np.zeros(first_chunk, dtype=np.int32)
        for row, sequence in enumerate(step.decodes):
            tokens[row] = sequence.tokens[-1]
            positions[row] = sequence.num_cached
            tables[row, : len(sequence.blocks)] = sequence.blocks
            context_lengths[row] = len(sequence.tokens)
        block = self.config.block_size
        at = positions[:num_decodes]
        slots[:num_decodes] = tables[np.arange(num_decodes), at // block] * block + at % block
        rows = list(range(num_decodes))
        end = first_chunk
        for chunk in step.chunks:
            begin, end = end, end + chunk.stop - chunk.start
            tokens[begin:end] = chunk.sequence.tokens[chunk.start : chunk.stop]
            positions[begin:end] = np.arange(chunk.start, chunk.stop)
            slots[begin:end] = self._slots_of(chunk.sequence, chunk.stop)[chunk.start :]
            if chunk.is_last:
                rows.append(end - 1)
        if not step.chunks:
            rows = list(range(first_chunk))
        sampled = step.sampled
        per_row = np.zeros((3, len(rows)), dtype=np.int64)
        per_row[0, : len(sampled)] = [s.sample_index for s in sampled]
        per_row[1, : len(sampled)] = [s.prompt_length + self.config.min_new_tokens for s in sampled]
        per_row[2, : len(sampled)] = [s.max_length - 1 for s in sampled]
        chunks, chunk_slots = self._chunk_keys(step)
        sample_index, first_stop, last_position = self._to_device(per_row)
        return StepTensors(
            tokens=self._to_device(tokens),
            positions=self._to_device(positions),
            paged=PagedSequences(
                cache=self.cache,
                slots=self._to_device(slots),
                block_tables=self._to_device(tables),
                context_lengths=self._to_device(context_lengths),
                chunks=chunks,
                chunk_slots=chunk_slots,
            ),
            rows=self._to_device(np.array(rows, dtype=np.int64)),
            sample_index=sample_index,
            first_stop=first_stop,
            last_position=last_position,
            is_idle=self._to_device(np.arange(len(rows)) >= len(sampled)),
        )

    def _chunk_keys(self, step: Step) -> tuple[PackedSequences | None, Tensor | None]:
        """Return where the step's chunks and their keys begin and end, and the keys' cache slots if any is older."""
        if not step.chunks:
            return None, None
        lengths = [chunk.stop - chunk.start for chunk in step.chunks]
        bounds = self._to_device(np.cumsum([0, *lengths], dtype=np.int32))
        sequences = PackedSequences.of(bounds, max(lengths))
        if all(chunk.start == 0 for chunk in step.chunks):
            return sequences, None
        key_lengths = [chunk.stop for chunk in step.chunks]
        sequences.cu_seqlens_kv = self._to_device(np.cumsum([0, *key_lengths], dtype=np.int32))
        sequences.max_seqlen_kv = max(key_lengths)
        slots = [self._slots_of(chunk.sequence, chunk.stop) for chunk in step.chunks]
        return sequences, self._to_device(np.concatenate(slots))

    def _slots_of(self, sequence: LiveSequence, length: int) -> np.ndarray:
        """Return the cache slots of a sequence's first `length` tokens."""
        block = self.config.block_size
        blocks = np.array(sequence.blocks[: math.ceil(length / block)], dtype=np.int64)
        return (blocks[:, None] * block + np.arange(block)).reshape(-1)[:length]

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _run_chunk(self, flight: Flight, virtual_stage: int, n: int) -> None:
        """Receive hidden states, run one pipeline chunk, and send its output on or sample from it."""
        module = self.network.modules[virtual_stage]
        tensors = flight.tensors
        if not module.pre_process:
            module.set_input_tensor([self._receive(len(tensors.tokens))])
        output = module(tensors.tokens, tensors.positions, tensors.paged, rows=tensors.rows)
        is_last_hop = virtual_stage == len(self.network.modules) - 1
        if module.post_process:
            if len(tensors.rows):  # none where a long prompt's chunk is the whole step
                self._sample(output, tensors, flight.sampled[n])
        else:
            self._send(output)
        if self.parallel.layout.pp > 1 and is_last_hop:
            flight.reply = dist.broadcast(
                flight.sampled,
                self.parallel.last_stage_rank,
                group=self.parallel.reply_group,
                async_op=True,
            )

    def _neighbour(self, offset: int) -> int:
        group = self.parallel.pp_group
        return dist.get_global_rank(group, (self.parallel.pp_rank + offset) % group.size())

    def _receive(self, num_tokens: int) -> Tensor:
        layout = self.parallel.layout
        rows = num_tokens // layout.tp if layout.sequence_parallel else num_tokens
        shape = (rows, 1, self.network.size.hidden_size)
        hidden = torch.empty(shape, dtype=self.network.dtype, device=self.device)
        # From the last stage to the first (virtual stages) in the other group: NCCL runs the messages
        # of a pair one after the other, and those of the two directions must not wait for each other.
        group = self.parallel.reply_group if self.parallel.is_first_stage else self.parallel.pp_group
        dist.recv(hidden, self._neighbour(-1), group=group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        group = self.parallel.reply_group if self.parallel.is_last_stage else self.parallel.pp_group
        hidden = hidden.contiguous()
        work = dist.isend(hidden, self._neighbour(1), group=group)
        self._sends.append((work, hidden))  # alive until it is sent

    def _sample(self, logits: Tensor, tensors: StepTensors, sampled: Tensor) -> None:
        """Draw a token a row from this rank's columns of the logits [R, V / tp] into sampled [2, R]."""
        config = self.config
        position = tensors.positions[tensors.rows] + 1  # of the token that is drawn
        draw = vocab_parallel_sample(
            logits,
            group=self.parallel.tp_group,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=self.seed,
            sample_index=tensors.sample_index,
            position=position,
            num_valid_vocab=self.network.size.vocab_size,
        )
        sampled[0] = draw.tokens.masked_fill(tensors.is_idle, IDLE_TOKEN)
        sampled[1] = draw.logprobs.view(torch.int32)

    def _advance(self, tensors: StepTensors, tokens: Tensor) -> None:
        """Make a decoding step the next one: every row feeds the token it drew, and stops where that was its last."""
        paged, block = tensors.paged, self.config.block_size
        is_stop = torch.isin(tokens, self.stop_tokens)
        tensors.is_idle |= is_stop | (tensors.positions + 1 >= tensors.last_position)
        tensors.tokens.copy_(tokens.clamp(min=0))
        tensors.positions += ~tensors.is_idle
        column = (tensors.positions // block)[:, None]
        slots = paged.block_tables.gather(1, column)[:, 0] * block + tensors.positions % block
        paged.slots.copy_(slots.masked_fill(tensors.is_idle, -1))
        lengths = (tensors.positions + 1).masked_fill(tensors.is_idle, 0)
        paged.context_lengths.copy_(lengths)


def free_bytes(device: torch.device) -> int:
    """Return the memory that a cache could take on this device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
