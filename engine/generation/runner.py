"""How a step runs on this rank: forward passes, the pipeline's messages, sampling, CUDA graphs.

A decoding step's passes are replayed from CUDA graphs, one of each pipeline chunk; the messages
between stages stay outside of them. Steps with parts of prompts run without.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.generation.cache import CacheShape
from engine.generation.decoding import Decoding, decoding_of
from engine.generation.draws import DrawSettings
from engine.generation.graphs import StepGraph
from engine.generation.scheduler import Step
from engine.generation.step_tensors import IDLE_TOKEN, StepTensors, upload
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from models.paged_attention import PagedCache
from models.readouts import Logits


@dataclass(kw_only=True)
class Flight:
    """A step on its way through the pipeline."""

    step: Step
    tensors: StepTensors
    sampled: Tensor
    """[num_steps, 2, R] int32: tokens, IDLE_TOKEN after the last, and the bits of their fp32
    log-probs."""
    is_replayed: bool
    """From graphs."""
    reply: dist.Work | None = None


class Runner:
    """Runs the steps of one generate() call. All ranks of a replica make the same calls."""

    def __init__(  # noqa: PLR0913 - what a draw depends on, each named
        self,
        network: Network,
        config: SamplingConfig,
        shape: CacheShape,
        *,
        stop_ids: frozenset[int],
        seed: int,
        absent_ids: tuple[int, ...] = (),
    ) -> None:
        """Holds no memory before open()."""
        self.network = network
        self.config = config
        self.shape = shape
        self.parallel = network.parallel
        self.device = network.parallel.device
        self.weights_version = network.weights_version
        self._settings = DrawSettings.of(config, stop_ids, absent_ids)
        self._seed = seed
        self._decoding: Decoding | None = None
        self._cache: PagedCache | None = None
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    def open(self) -> None:
        """Take memory for the cache, before the first step."""
        self._decoding = decoding_of(self.network)
        self._cache, self._draws = self._decoding.open(
            self.network, self.shape, self._settings, self._seed
        )
        self._record = self._decoding.record if self.config.cuda_graphs else None

    def close(self) -> None:
        """Give the cache's memory back, after the last."""
        self._cache = None
        if self._decoding is not None:
            self._decoding.close()
            self._decoding = None

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Start a step: run this rank's first pipeline chunk; without pipeline, all num_steps."""
        self.network.check_present()
        if self.network.weights_version != self.weights_version:
            raise RuntimeError(
                "the weights changed while responses were being generated: finish or close the "
                "iterator of generate() before the optimizer's step"
            )
        assert self._decoding is not None and self._cache is not None  # open() came first
        num_rows = len(step.decodes)
        is_replayed = self._record is not None and not step.prefills and not step.copies
        if is_replayed:
            self._decoding.check(self.network, self._cache)
            num_rows = graph_rows(num_rows)
        tensors = upload(
            step,
            self._cache,
            num_decode_rows=num_rows,
            min_new_tokens=self.config.min_new_tokens,
            device=self.device,
        )
        shape = (step.num_steps, 2, len(tensors.rows))
        sampled = torch.empty(shape, dtype=torch.int32, device=self.device)
        flight = Flight(step=step, tensors=tensors, sampled=sampled, is_replayed=is_replayed)
        for n in range(step.num_steps):
            self._run_chunk(flight, 0, n)
        return flight

    @torch.inference_mode()
    def proceed(self, flight: Flight, virtual_stage: int) -> None:
        """Run one of this rank's later pipeline chunks on a step."""
        self._run_chunk(flight, virtual_stage, 0)

    def drain(self, flights: Sequence[Flight | None]) -> None:
        """Wait for the messages that are under way, when generation ends before its steps do.

        A send whose tensor is freed first may never arrive, and the next stage waits for it.
        """
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        for flight in flights:
            if flight is not None and flight.reply is not None:
                flight.reply.wait()

    def collect(self, flight: Flight) -> list[tuple[list[int], list[float]]]:
        """Wait for a step and return (tokens, logprobs) of each of its sampled sequences.

        Raises FloatingPointError when logits were not finite.
        """
        if flight.reply is not None:
            flight.reply.wait()
        sampled = flight.sampled.cpu().numpy()  # sync
        num_rows = len(flight.step.sampled)
        tokens = sampled[:, 0, :num_rows].T  # [rows, steps]
        logprobs = sampled[:, 1, :num_rows].T.copy().view(np.float32)
        is_drawn = tokens != IDLE_TOKEN
        is_broken = (is_drawn & ~np.isfinite(logprobs)).any(1)
        if is_broken.any():
            sequence = flight.step.sampled[int(is_broken.argmax())]
            raise FloatingPointError(
                f"the logits of sample {sequence.sample_index} are not finite after "
                f"{len(sequence.tokens)} tokens: the weights hold NaN or infinity, or are too "
                "large for their dtype"
            )
        return [
            (row[:num_tokens], row_logprobs[:num_tokens])
            for row, row_logprobs, num_tokens in zip(
                tokens.tolist(), logprobs.tolist(), is_drawn.sum(1).tolist(), strict=True
            )
        ]

    def _run_chunk(self, flight: Flight, virtual_stage: int, n: int) -> None:
        """Receive hidden states, run one pipeline chunk on the n-th of a flight's steps, send its
        output on or sample from it."""
        hidden, tensors = None, flight.tensors
        if not self.network.modules[virtual_stage].pre_process:
            hidden = self._receive(len(tensors.tokens))
        if flight.is_replayed:
            output = self._replay(flight, virtual_stage, n, hidden)
        else:
            if n > 0:
                tensors.advance(flight.sampled[n - 1, 0], self._draws.stop_tokens)
            output = self._compute(virtual_stage, tensors, hidden, flight.sampled[n])
        if output is not None:
            self._send(output)
        is_last_hop = virtual_stage == len(self.network.modules) - 1
        if self.parallel.layout.pp > 1 and is_last_hop:
            flight.reply = dist.broadcast(
                flight.sampled,
                group_src=self.parallel.layout.pp - 1,
                group=self.parallel.reply_group,
                async_op=True,
            )

    def _compute(
        self, virtual_stage: int, tensors: StepTensors, hidden: Tensor | None, sampled: Tensor
    ) -> Tensor | None:
        """Return a chunk's output for the next, or draw from it; nothing here asks the host."""
        module = self.network.modules[virtual_stage]
        if hidden is not None:
            module.set_input_tensor([hidden])
        output = module.forward_paged(
            tensors.tokens, tensors.positions, tensors.paged, Logits(tensors.rows)
        )
        if not module.post_process:
            return output
        if len(tensors.rows):  # none where a part of a long prompt is the whole step
            self._draws(output, tensors, sampled)
        return None

    def _replay(
        self, flight: Flight, virtual_stage: int, n: int, hidden: Tensor | None
    ) -> Tensor | None:
        """Do `_compute` from a graph, which is recorded first where its shape is new."""
        assert self._decoding is not None
        tensors, graphs = flight.tensors, self._decoding.graphs
        key = (virtual_stage, len(tensors.rows), tensors.paged.block_tables.shape[1])
        if key not in graphs:
            graphs[key] = self._capture(virtual_stage, tensors, hidden)
        graph = graphs[key]
        if n == 0:  # it has made the others itself
            for mine, theirs in zip(graph.inputs, tensors.buffers(), strict=True):
                mine.copy_(theirs)
        if graph.hidden is not None and hidden is not None:
            graph.hidden.copy_(hidden)
        graph.recorded.replay()
        if graph.output is not None:
            return graph.output.clone()  # which is sent while the next step writes
        flight.sampled[n].copy_(graph.sampled)
        return None

    def _capture(
        self, virtual_stage: int, tensors: StepTensors, hidden: Tensor | None
    ) -> StepGraph:
        """Return the graph of a chunk's step of as many rows; it has tensors of its own.

        What the run before the capture writes into the cache, the first replay writes again.
        """
        assert self._decoding is not None and self._record is not None
        mine, num_rows = tensors.clone(), len(tensors.rows)
        taken = None if hidden is None else hidden.clone()
        output = None
        if not self.network.modules[virtual_stage].post_process:
            shape = (num_rows, 1, self.network.size.hidden_size)
            output = torch.empty(shape, dtype=self.network.dtype, device=self.device)
        sampled = torch.empty((2, num_rows), dtype=torch.int32, device=self.device)

        def work() -> None:
            mine.paged.decode_groups.clear()  # the lengths are another step's now
            made = self._compute(virtual_stage, mine, taken, sampled)
            if made is not None and output is not None:
                output.copy_(made)
            elif self.parallel.layout.pp == 1:
                mine.advance(sampled[0], self._draws.stop_tokens)

        others = [graph.recorded for graph in self._decoding.graphs.values()]
        return StepGraph(
            recorded=self._record(work, others[0] if others else None),
            inputs=mine.buffers(),
            hidden=taken,
            output=output,
            sampled=sampled,
        )

    def _receive(self, num_tokens: int) -> Tensor:
        shape = (num_tokens, 1, self.network.size.hidden_size)
        hidden = torch.empty(shape, dtype=self.network.dtype, device=self.device)
        # What goes from the last stage to the first (virtual stages) takes the other group: NCCL
        # runs the messages of a pair of ranks in order, and the two directions would wait.
        is_wrapped = self.parallel.is_first_stage
        group = self.parallel.reply_group if is_wrapped else self.parallel.pp_group
        source = (self.parallel.pp_rank - 1) % self.parallel.layout.pp
        dist.recv(hidden, group_src=source, group=group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        is_wrapped = self.parallel.is_last_stage
        group = self.parallel.reply_group if is_wrapped else self.parallel.pp_group
        target = (self.parallel.pp_rank + 1) % self.parallel.layout.pp
        hidden = hidden.contiguous()
        work = dist.isend(hidden, group_dst=target, group=group)
        assert work is not None  # it is for ranks outside of the group
        self._sends.append((work, hidden))  # which lives until it is sent


def graph_rows(num_rows: int) -> int:
    """Return the rows of a graph for so many decoding sequences: few shapes, so that few graphs are
    recorded. Powers of two, then multiples of 16."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 16 else -(-num_rows // 16) * 16
