"""How a step runs on this rank: forward passes, the pipeline's messages, sampling, CUDA graphs.

The CUDA graphs are written with care and untested: they have not run on a GPU yet.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.generation.scheduler import Step
from engine.generation.step_tensors import IDLE_TOKEN, StepTensors, upload
from engine.network import Network
from engine.settings.sampling import SamplingConfig
from models.paged_attention import PagedCache
from models.vocab_parallel import vocab_parallel_sample


@dataclass(kw_only=True)
class Flight:
    """A step on its way through the pipeline."""

    step: Step
    tensors: StepTensors
    sampled: Tensor
    """[num_steps, 2, R] int32: tokens, IDLE_TOKEN after the last, and the bits of their fp32
    log-probs."""
    reply: dist.Work | None = None


@dataclass(kw_only=True)
class DecodeGraph:
    """A CUDA graph of one decoding step of a fixed number of rows; advances its own tensors."""

    graph: torch.cuda.CUDAGraph
    tensors: StepTensors
    sampled: Tensor
    """[2, R] int32."""


class Runner:
    """Runs the steps of one generate() call. All ranks of a replica make the same calls."""

    def __init__(
        self,
        network: Network,
        config: SamplingConfig,
        cache: PagedCache,
        *,
        stop_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.network = network
        self.config = config
        self.cache = cache
        self.seed = seed
        self.parallel = network.parallel
        self.device = network.parallel.device
        self.weights_version = network.weights_version
        self.stop_tokens = torch.tensor(sorted(stop_ids), device=self.device)  # [S]
        # Which of them this rank's columns of the logits hold, and where.
        num_columns = network.size.padded_vocab_size // self.parallel.layout.tp
        first_column = self.parallel.tp_rank * num_columns
        columns = [token - first_column for token in sorted(stop_ids)]
        held = [n for n, column in enumerate(columns) if 0 <= column < num_columns]
        self._held_stops = torch.tensor(held, dtype=torch.int64, device=self.device)
        self._stop_columns = torch.tensor(
            [columns[n] for n in held], dtype=torch.int64, device=self.device
        )
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        self._graphs: dict[int, DecodeGraph] = {}
        # Not in a pipeline, whose messages between ranks stay outside of graphs.
        self._uses_graphs = (
            config.cuda_graphs and self.device.type == "cuda" and self.parallel.layout.pp == 1
        )

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Start a step: run this rank's first pipeline chunk; without pipeline, all num_steps."""
        self.network.check_present()
        if self.network.weights_version != self.weights_version:
            raise RuntimeError(
                "the weights changed while responses were being generated: finish or close the "
                "iterator of generate() before the optimizer's step"
            )
        tensors = upload(
            step,
            self.cache,
            num_decode_rows=self._num_decode_rows(step),
            min_new_tokens=self.config.min_new_tokens,
            device=self.device,
        )
        shape = (step.num_steps, 2, len(tensors.rows))
        sampled = torch.empty(shape, dtype=torch.int32, device=self.device)
        flight = Flight(step=step, tensors=tensors, sampled=sampled)
        if self._uses_graphs and not step.chunks:
            self._replay(flight)
            return flight
        for n in range(step.num_steps):
            if n > 0:
                tensors.advance(sampled[n - 1, 0], self.stop_tokens)
            self._run_chunk(flight, 0, sampled[n])
        return flight

    @torch.inference_mode()
    def proceed(self, flight: Flight, virtual_stage: int) -> None:
        """Run one of this rank's later pipeline chunks on a step."""
        self._run_chunk(flight, virtual_stage, flight.sampled[0])

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
                f"{len(sequence.tokens)} tokens: the weights hold NaN or infinity"
            )
        return [
            (row[:num_tokens], row_logprobs[:num_tokens])
            for row, row_logprobs, num_tokens in zip(
                tokens.tolist(), logprobs.tolist(), is_drawn.sum(1).tolist(), strict=True
            )
        ]

    def _num_decode_rows(self, step: Step) -> int:
        """Return the rows before a step's chunks: more than it decodes where a graph takes more."""
        num_rows = len(step.decodes)
        if self._uses_graphs and not step.chunks:
            # Few shapes, so that few graphs are captured: powers of two, then multiples of 16.
            is_small = num_rows <= 16
            num_rows = 1 << (num_rows - 1).bit_length() if is_small else -(-num_rows // 16) * 16
        return num_rows

    def _run_chunk(self, flight: Flight, virtual_stage: int, sampled: Tensor) -> None:
        """Receive hidden states, run one pipeline chunk, send its output on or sample from it."""
        module, tensors = self.network.modules[virtual_stage], flight.tensors
        if not module.pre_process:
            module.set_input_tensor([self._receive(len(tensors.tokens))])
        output = module(tensors.tokens, tensors.positions, tensors.paged, rows=tensors.rows)
        if not module.post_process:
            self._send(output)
        elif len(tensors.rows):  # none where a part of a long prompt is the whole step
            self._sample(output, tensors, sampled)
        is_last_hop = virtual_stage == len(self.network.modules) - 1
        if self.parallel.layout.pp > 1 and is_last_hop:
            flight.reply = dist.broadcast(
                flight.sampled,
                group_src=self.parallel.layout.pp - 1,
                group=self.parallel.reply_group,
                async_op=True,
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

    def _sample(self, logits: Tensor, tensors: StepTensors, sampled: Tensor) -> None:
        """Draw a token a row from this rank's columns of the logits [R, V / tp] into [2, R]."""
        config = self.config
        position = tensors.positions[tensors.rows] + 1  # of the token that is drawn
        is_early = position < tensors.first_stop
        stop_mass = self._suppress_stops(logits, is_early) if config.min_new_tokens else None
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
        logprobs = draw.logprobs
        if stop_mass is not None:
            # Under the full softmax: log p = z - log(sum of e^z without and with the stop tokens).
            everything = torch.logaddexp(draw.logsumexp, stop_mass)
            logprobs = torch.where(is_early, logprobs + draw.logsumexp - everything, logprobs)
        sampled[0] = draw.tokens.masked_fill(tensors.is_idle, IDLE_TOKEN)
        sampled[1] = logprobs.contiguous().view(torch.int32)

    def _suppress_stops(self, logits: Tensor, is_early: Tensor) -> Tensor:
        """Put stop tokens' logits to -inf in rows that are early; return their logsumexp [R]."""
        held = logits[:, self._stop_columns]
        logits[:, self._stop_columns] = held.masked_fill(is_early[:, None], -torch.inf)
        stops = logits.new_full((len(logits), len(self.stop_tokens)), -torch.inf)
        stops[:, self._held_stops] = held
        dist.all_reduce(stops, op=dist.ReduceOp.MAX, group=self.parallel.tp_group)
        return (stops / (self.config.temperature or 1.0)).logsumexp(1)

    def _replay(self, flight: Flight) -> None:
        """Run a decoding step's graph num_steps times; capture it first where its shape is new."""
        num_rows = len(flight.tensors.rows)
        graph = self._graphs.get(num_rows)
        if graph is None:
            graph = self._graphs[num_rows] = self._capture(flight)
        graph.tensors.copy_(flight.tensors)
        for sampled in flight.sampled:
            graph.graph.replay()
            sampled.copy_(graph.sampled)

    def _capture(self, flight: Flight) -> DecodeGraph:
        """Return the graph of a decoding step of as many rows; it reads tensors of its own."""
        tensors, sampled = flight.tensors.clone(), torch.empty_like(flight.sampled[0])
        static = dataclasses.replace(flight, tensors=tensors)

        def decode() -> None:
            self._run_chunk(static, 0, sampled)
            tensors.advance(sampled[0], self.stop_tokens)

        # The first run compiles kernels, loads them and opens connections, which a capture must
        # not, on another stream than the work that is still queued. What it writes into the cache
        # the first replay writes again.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # One pool: no graph's scratch memory outlives its replay. It is freed with this runner.
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        # thread_local: what other threads ask the device meanwhile does not spoil the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            decode()
        return DecodeGraph(graph=graph, tensors=tensors, sampled=sampled)
