"""Run a network over micro-batches and pipeline stages: forward and backward, or forward only.

A loss sees one micro-batch and returns its share of the global loss, already divided by global
counts. So gradients are sums over micro-batches and data-parallel ranks: no layout changes them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from engine.data.batches import PackedBatch
from engine.ranks.parallel import Parallel
from engine.ranks.signs import come_further
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.reduce import StepMetrics, merge_metrics
from kernels.linear_logprobs import TokenLoss
from models.context_parallel import ContextShare
from models.packed_sequences import PackedSequences
from models.readouts import Logprobs, Readings, Readout, TokenLosses

ScalarLoss = Callable[[PackedBatch, Tensor], tuple[Tensor, StepMetrics]]
"""(micro-batch, readings [T]) to its share of the loss, and metrics."""


class LanguageLoss(Protocol):
    """A loss that is a sum over tokens, each from its own log-prob: the head makes loss and
    gradients in one pass over the logits."""

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return f(log-probs [n], their positions in the batch [n]) -> losses [n], and what goes
        with them; see kernels/linear_logprobs.py."""

    def metrics(self, batch: PackedBatch, terms: Tensor) -> StepMetrics:
        """Return what the token loss's terms [k, T] say, or the log-probs [T] where it has none;
        without gradient."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One term of a step's loss: `scale` x the sum of a loss over micro-batches."""

    batches: Sequence[PackedBatch]
    loss: LanguageLoss | ScalarLoss
    """A LanguageLoss for a language model, a ScalarLoss on the readings of a scalar one."""
    temperature: float = 1.0
    scale: float = 1.0
    """Multiplies the gradient; the metrics are those of the loss itself."""


def forward_backward(
    network: Network,
    batches: Sequence[PackedBatch],
    loss: LanguageLoss | ScalarLoss,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> StepMetrics:
    """Add the gradient of a step's only objective to the network's buffers; see accumulate."""
    objective = Objective(batches=batches, loss=loss, temperature=temperature, scale=scale)
    return accumulate(network, [objective])


def accumulate(network: Network, objectives: Sequence[Objective]) -> StepMetrics:
    """Add the gradients of all of a step's objectives to the network's buffers.

    The losses run on the last stage. Returns their metrics there, merged over this rank's
    micro-batches (engine/training/reduce.py), and nothing elsewhere. Where the reduction over
    data-parallel ranks overlaps, the last backward pass of every bucket starts it. So a second
    call before the next zero_gradients is a RuntimeError.
    """
    if any(group.per_param_grad_ready_counts for group in network.overlapping_groups):
        raise RuntimeError(
            "the gradients are being reduced already: a step's objectives go into one accumulate()"
        )
    stored: list[StepMetrics] = []
    passes = _passes(objectives, network.parallel.layout)
    for number, work in enumerate(passes):
        with network.reducing(starts=number == len(passes) - 1):
            training_step = functools.partial(_training_step, network.parallel)
            stored += _run_schedule(network, work, training_step, forward_only=False)
    return merge_metrics(stored)


def _training_step(
    parallel: Parallel, iterator: Iterator[tuple[PackedBatch, Objective]], chunk: torch.nn.Module
) -> tuple[Any, Any]:
    batch, objective = next(iterator)
    readout: Readout = Readings()
    if not callable(objective.loss):
        token_loss = objective.loss.token_loss(batch)
        readout = TokenLosses(_logprobs(batch, objective.temperature), token_loss)
    return _call(chunk, batch, parallel, readout), functools.partial(_loss_of, batch, objective)


def _loss_of(
    batch: PackedBatch, objective: Objective, output: Any
) -> tuple[Tensor, Tensor, StepMetrics]:
    if callable(objective.loss):
        value, metrics = objective.loss(batch, output)
    else:
        value, terms = output
        metrics = objective.loss.metrics(batch, terms)
    no_tokens = torch.zeros((), dtype=torch.int, device=value.device)
    return value * objective.scale, no_tokens, metrics


def _passes(
    objectives: Sequence[Objective], layout: ParallelLayout
) -> list[list[tuple[PackedBatch, Objective]]]:
    """Return the micro-batches, each with its objective, of every run through the pipeline.

    A pipeline of p stages with v chunks each runs m micro-batches padded to L tokens. It is busy,
    or idle while it fills and drains, for the time of (m + (p - 1) / v) L tokens. One pass over all
    objectives fills and drains once, but pads all to the longest of all. It is taken unless that
    costs more: with p = 16, 2 rows of responses and 16 of pretraining text of one length, 33 units
    instead of 17 + 31.
    """
    passes = [[(batch, objective) for batch in objective.batches] for objective in objectives]
    joint = [pair for work in passes for pair in work]
    if layout.pp == 1:
        return [joint]
    idle = (layout.pp - 1) / layout.virtual_pp

    def duration(work: list[tuple[PackedBatch, Objective]]) -> float:
        return (len(work) + idle) * max(len(batch.tokens) for batch, _ in work)

    return [joint] if duration(joint) <= sum(duration(work) for work in passes) else passes


def forward(
    network: Network, batches: Sequence[PackedBatch], *, temperature: float = 1.0
) -> list[Tensor]:
    """Return the network's output [T] for every micro-batch, on every rank of the pipeline."""

    def forward_step(iterator: Iterator, chunk: torch.nn.Module) -> tuple[Any, Any]:
        batch, _ = next(iterator)
        is_language = network.kind == "language"
        readout = _logprobs(batch, temperature) if is_language else Readings()
        output = _call(chunk, batch, network.parallel, readout)
        return output, lambda output: (output.sum(), no_tokens, output)

    no_tokens = torch.zeros((), dtype=torch.int, device=network.parallel.device)
    network.settle()
    with torch.no_grad():
        work = [(batch, None) for batch in batches]
        outputs = _run_schedule(network, work, forward_step, forward_only=True)
    lengths = [len(batch.tokens) for batch in batches]
    if network.parallel.layout.pp == 1:
        return outputs
    if network.parallel.is_last_stage:  # rows may have been padded for the pipeline
        flat = torch.cat([out[:n] for out, n in zip(outputs, lengths, strict=True)])
    else:
        flat = torch.empty(sum(lengths), device=network.parallel.device)
    dist.broadcast(flat, src=network.parallel.last_stage_rank, group=network.parallel.pp_group)
    return list(flat.split(lengths))


def finish_gradients(network: Network) -> None:
    """Sum the gradient buffers over data-parallel ranks, tied embeddings and sequence-parallel
    norms; once a step."""
    with network.parallel.active():
        finalize_model_grads(network.chunks)


def _logprobs(batch: PackedBatch, temperature: float) -> Logprobs:
    return Logprobs(batch.mask, batch.targets, temperature)


def _call(chunk: torch.nn.Module, batch: PackedBatch, parallel: Parallel, readout: Readout) -> Any:
    come_further()
    share = None
    if parallel.layout.cp > 1:
        share = ContextShare(group=parallel.cp_group, num_tokens=len(batch.tokens))
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen, share, batch.prefixes)
    return chunk(batch.tokens, batch.positions, sequences, readout)


def _run_schedule(
    network: Network,
    work: Sequence[tuple[PackedBatch, Any]],
    forward_step: Callable,
    *,
    forward_only: bool,
) -> list:
    """Run megatron's schedule (no pipelining, 1F1B or interleaved) over micro-batches and what goes
    with each; return what the losses stored.

    A pipeline's rows are padded to the longest, so that stages need not tell each other shapes.
    megatron's variable lengths cost a host sync a hop, and it sends the shapes batched, whatever
    models/layers.py says of other messages: with two stages and interleaving the two directions
    then change places. Token budgets keep the padding small.
    """
    network.check_present()
    longest = max(len(batch.tokens) for batch, _ in work)
    if network.parallel.layout.pp > 1:
        work = [(_padded(batch, longest), rest) for batch, rest in work]
    num_chunks = len(network.chunks)
    iterators = [iter(work) for _ in range(num_chunks)]
    with network.parallel.active():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if num_chunks > 1 else iterators[0],
            model=network.chunks if num_chunks > 1 else network.chunks[0],
            num_microbatches=len(work),
            seq_length=longest,
            micro_batch_size=1,  # one packed row
            forward_only=forward_only,
        )


def _padded(batch: PackedBatch, length: int) -> PackedBatch:
    """Add masked sequences of token 0 until the row has `length` tokens."""
    num_tokens = len(batch.tokens)
    num_padding = length - num_tokens
    if num_padding == 0:
        return batch
    # Padding keeps to lengths that the batch has already, so positions stay within the context.
    cuts = [*range(num_tokens + batch.max_seqlen, length, batch.max_seqlen), length]
    device = batch.tokens.device
    positions = torch.arange(num_padding, device=device) % batch.max_seqlen
    fields = {
        name: F.pad(value, (0, num_padding if len(value) == num_tokens else len(cuts)))
        for name, value in batch.fields.items()
    }
    return dataclasses.replace(
        batch,
        tokens=F.pad(batch.tokens, (0, num_padding)),
        positions=torch.cat([batch.positions, positions]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor(cuts)]),
        mask=F.pad(batch.mask, (0, num_padding)),
        sequence_ids=F.pad(batch.sequence_ids, (0, len(cuts)), value=-1),
        fields=fields,
        prefixes=batch.prefixes and batch.prefixes.padded(len(cuts), num_padding),
    )
