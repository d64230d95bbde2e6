"""Run a network over micro-batches and pipeline stages: forward and backward, or forward only.

A loss sees one micro-batch and returns its share of the global loss, already divided by global
counts, so gradients are sums over micro-batches and data-parallel ranks and no layout changes them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from engine.data.batches import PackedBatch
from engine.network import Network
from engine.parallel import Parallel
from kernels.linear_logprobs import TokenLoss
from kernels.moments import merge_moments
from models.attention import PackedSequences

Metrics = dict[str, Tensor]
ScalarLoss = Callable[[PackedBatch, Tensor], tuple[Tensor, Metrics]]
"""(micro-batch, readings [T]) to its share of the loss, and metrics."""


class LanguageLoss(Protocol):
    """A loss that is a sum over tokens, each from its own log-prob: the head makes loss and
    gradients in one pass over the logits."""

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return f(log-probs [n], their positions in the batch [n]) -> losses [n]."""

    def metrics(self, batch: PackedBatch, logprobs: Tensor) -> Metrics:
        """Return what the log-probs [T] of a micro-batch say, without gradient."""


def forward_backward(
    network: Network,
    batches: Sequence[PackedBatch],
    loss: LanguageLoss | ScalarLoss,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Metrics:
    """Add `scale` x the gradient of the summed losses to the network's gradient buffers.

    The loss runs on the last stage: a LanguageLoss for a language model, a ScalarLoss on the
    readings of a scalar one. Returns the metrics summed over this rank's micro-batches (`*_max`,
    `*_min`: extremes) on the last stage, nothing elsewhere; see reduce_metrics.
    """

    def forward_step(iterator: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        heads: dict[str, Any] = {}
        if not callable(loss):
            token_loss = loss.token_loss(batch)
            heads = _language_heads(batch, temperature) | {"token_loss": token_loss}
        return _call(chunk, batch, heads), functools.partial(loss_of, batch)

    def loss_of(batch: PackedBatch, output: Any) -> tuple[Tensor, Tensor, Metrics]:
        if callable(loss):
            value, metrics = loss(batch, output)
        else:
            value, logprobs = output
            metrics = loss.metrics(batch, logprobs)
        return value * scale, torch.zeros((), dtype=torch.int, device=value.device), metrics

    return _merge(_run_schedule(network, batches, forward_step, forward_only=False))


def forward(
    network: Network, batches: Sequence[PackedBatch], *, temperature: float = 1.0
) -> list[Tensor]:
    """Return the network's output [T] for every micro-batch, on every rank of the pipeline."""

    def forward_step(iterator: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        is_language = network.kind == "language"
        heads = _language_heads(batch, temperature) if is_language else {}
        return _call(chunk, batch, heads), lambda output: (output.sum(), no_tokens, output)

    no_tokens = torch.zeros((), dtype=torch.int, device=network.parallel.device)
    with torch.no_grad():
        outputs = _run_schedule(network, batches, forward_step, forward_only=True)
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
    finalize_model_grads(network.chunks)


def reduce_metrics(metrics: Metrics, parallel: Parallel) -> dict[str, float]:
    """Return the metrics of the last stages of all data-parallel ranks as numbers, the same on
    every rank.

    `*_moments` [3] give two numbers, `*_mean` and `*_variance`.
    """
    is_source = parallel.is_last_stage and parallel.tp_rank == 0
    mine = {name: value.tolist() for name, value in metrics.items()} if is_source else {}  # sync
    gathered: list[dict[str, Any]] = [{}] * parallel.world_size
    dist.all_gather_object(gathered, mine)
    merged: Metrics = {}
    for part in gathered:  # in rank order: the same sum everywhere
        for name, value in part.items():
            number = torch.tensor(value, dtype=torch.float64)
            merged[name] = _combine(name, merged[name], number) if name in merged else number
    values: dict[str, float] = {}
    for name, value in merged.items():
        if name.endswith("_moments"):
            count, mean, squares = value.tolist()
            stem = name.removesuffix("_moments")
            values[f"{stem}_mean"] = mean
            values[f"{stem}_variance"] = squares / max(count, 1.0)
        else:
            values[name] = float(value)
    return values


def _language_heads(batch: PackedBatch, temperature: float) -> dict[str, Any]:
    return {"mask": batch.mask, "targets": batch.targets, "temperature": temperature}


def _call(chunk: torch.nn.Module, batch: PackedBatch, heads: dict[str, Any]) -> Any:
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
    return chunk(batch.tokens, batch.positions, sequences, **heads)


def _run_schedule(
    network: Network,
    batches: Sequence[PackedBatch],
    forward_step: Callable,
    *,
    forward_only: bool,
) -> list:
    """Run megatron's schedule (no pipelining, 1F1B or interleaved); return what the losses
    stored."""
    if network.parallel.layout.pp > 1:
        batches = _of_one_length(batches)
    num_chunks = len(network.chunks)
    iterators = [iter(batches) for _ in range(num_chunks)]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if num_chunks > 1 else iterators[0],
        model=network.chunks if num_chunks > 1 else network.chunks[0],
        num_microbatches=len(batches),
        seq_length=max(len(batch.tokens) for batch in batches),
        micro_batch_size=1,  # one packed row
        forward_only=forward_only,
    )


def _of_one_length(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """Pad the rows of a pipeline to the longest, so that stages need not tell each other shapes.

    megatron's variable lengths cost a host sync a hop, and with two stages and interleaving it
    confuses the shapes of the two directions, which then go to the same rank. Token budgets keep
    the padding small.
    """
    longest = max(len(batch.tokens) for batch in batches)
    return [_padded(batch, longest) for batch in batches]


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
    )


def _merge(stored: list[Metrics]) -> Metrics:
    merged: Metrics = {}
    for metrics in stored:
        for name, value in metrics.items():
            value = value.detach()
            merged[name] = _combine(name, merged[name], value) if name in merged else value
    return merged


def _combine(name: str, a: Tensor, b: Tensor) -> Tensor:
    if name.endswith("_max"):
        return torch.maximum(a, b)
    if name.endswith("_min"):
        return torch.minimum(a, b)
    if name.endswith("_moments"):
        return merge_moments(torch.stack([a, b]))
    return a + b
