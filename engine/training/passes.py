"""Run a network over micro-batches and pipeline stages: forward and backward, or forward only.

A loss sees one micro-batch and returns its share of the global loss, already divided by global
counts, so gradients are sums over micro-batches and data-parallel ranks and no layout changes them.
"""

import contextlib
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
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from kernels.linear_logprobs import TokenLoss
from kernels.moments import merge_moments
from models.attention import PackedSequences
from models.context_parallel import ContextShare

Metrics = dict[str, Tensor]
ScalarLoss = Callable[[PackedBatch, Tensor], tuple[Tensor, Metrics]]
"""(micro-batch, readings [T]) to its share of the loss, and metrics."""


class LanguageLoss(Protocol):
    """A loss that is a sum over tokens, each from its own log-prob: the head makes loss and
    gradients in one pass over the logits."""

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return f(log-probs [n], their positions in the batch [n]) -> losses [n], with their
        derivatives [n] or for torch to differentiate."""

    def metrics(self, batch: PackedBatch, logprobs: Tensor) -> Metrics:
        """Return what the log-probs [T] of a micro-batch say, without gradient."""


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
) -> Metrics:
    """Add the gradient of a step's only objective to the network's buffers; see accumulate."""
    objective = Objective(batches=batches, loss=loss, temperature=temperature, scale=scale)
    return accumulate(network, [objective])


def accumulate(network: Network, objectives: Sequence[Objective]) -> Metrics:
    """Add the gradients of all of a step's objectives to the network's buffers.

    The losses run on the last stage. Returns their metrics summed over this rank's micro-batches
    (`*_max`, `*_min`: extremes) on the last stage, nothing elsewhere; see reduce_metrics. Where the
    reduction over data-parallel ranks overlaps, the last backward pass of every bucket starts it,
    so a second call before the next zero_gradients is a RuntimeError.
    """
    if any(group.per_param_grad_ready_counts for group in _overlapping_groups(network)):
        raise RuntimeError(
            "the gradients are being reduced already: a step's objectives go into one accumulate()"
        )
    stored: list[Metrics] = []
    passes = _passes(objectives, network.parallel.layout)
    for number, work in enumerate(passes):
        with _reduction(network, starts=number == len(passes) - 1):
            training_step = functools.partial(_training_step, network.parallel)
            stored += _run_schedule(network, work, training_step, forward_only=False)
    return _merge(stored)


def _training_step(
    parallel: Parallel, iterator: Iterator[tuple[PackedBatch, Objective]], chunk: torch.nn.Module
) -> tuple[Any, Any]:
    batch, objective = next(iterator)
    heads: dict[str, Any] = {}
    if not callable(objective.loss):
        token_loss = objective.loss.token_loss(batch)
        heads = _language_heads(batch, objective.temperature) | {"token_loss": token_loss}
    return _call(chunk, batch, parallel, heads), functools.partial(_loss_of, batch, objective)


def _loss_of(
    batch: PackedBatch, objective: Objective, output: Any
) -> tuple[Tensor, Tensor, Metrics]:
    if callable(objective.loss):
        value, metrics = objective.loss(batch, output)
    else:
        value, logprobs = output
        metrics = objective.loss.metrics(batch, logprobs)
    no_tokens = torch.zeros((), dtype=torch.int, device=value.device)
    return value * objective.scale, no_tokens, metrics


def _passes(
    objectives: Sequence[Objective], layout: ParallelLayout
) -> list[list[tuple[PackedBatch, Objective]]]:
    """Return the micro-batches, each with its objective, of every run through the pipeline.

    m micro-batches padded to L tokens keep a pipeline of p stages with v chunks each busy, or idle
    while it fills and drains, for the time of (m + (p - 1) / v) L tokens. One pass over all
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


@contextlib.contextmanager
def _reduction(network: Network, *, starts: bool) -> Iterator[None]:
    """Run a block whose backward passes start the overlapped reduction of a bucket with its last
    micro-batch, or not at all."""
    config, chunks = network.config, network.chunks
    with contextlib.ExitStack() as stack:
        if not any(_overlapping_groups(network)):
            pass
        elif starts:
            no_syncs = [chunk.no_sync for chunk in chunks]  # the schedules keep all but the last so
            config.no_sync_func = no_syncs if len(chunks) > 1 else no_syncs[0]
            stack.callback(setattr, config, "no_sync_func", None)
        else:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
        yield


def _overlapping_groups(network: Network) -> list[Any]:
    """megatron's groups of buckets whose reduction overlaps with backward passes."""
    return [
        group
        for chunk in network.chunks
        for group in getattr(chunk, "bucket_groups", [])
        if group.ddp_config.overlap_grad_reduce
    ]


def forward(
    network: Network, batches: Sequence[PackedBatch], *, temperature: float = 1.0
) -> list[Tensor]:
    """Return the network's output [T] for every micro-batch, on every rank of the pipeline."""

    def forward_step(iterator: Iterator, chunk: torch.nn.Module) -> tuple[Any, Any]:
        batch, _ = next(iterator)
        is_language = network.kind == "language"
        heads = _language_heads(batch, temperature) if is_language else {}
        output = _call(chunk, batch, network.parallel, heads)
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


def reduce_metrics(metrics: Metrics, parallel: Parallel) -> dict[str, float]:
    """Return the metrics of the last stages of all data-parallel ranks as numbers, the same on
    every rank.

    Ranks that share rows have the same metrics, so those of a pipeline's last stage ask one another
    along dp only, and tell their pipeline: a thousand ranks send a handful of messages each.
    `*_moments` [3] give two numbers, `*_mean` and `*_variance`.
    """
    values: dict[str, float] = {}
    if parallel.is_last_stage:
        sizes = [value.numel() for value in metrics.values()]  # in the same order on every rank
        mine = torch.cat([value.double().flatten() for value in metrics.values()])
        gathered = mine.new_empty(parallel.dp * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=parallel.dp_group)
        rows = gathered.cpu().view(parallel.dp, -1)  # sync: the only one
        parts = [dict(zip(metrics, row.split(sizes), strict=True)) for row in rows]
        values = _numbers(_merge(parts))  # in rank order: the same sum everywhere
    if parallel.layout.pp > 1:
        told = [values]
        dist.broadcast_object_list(told, src=parallel.last_stage_rank, group=parallel.pp_group)
        values = told[0]
    return values


def _numbers(merged: Metrics) -> dict[str, float]:
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


def _call(
    chunk: torch.nn.Module, batch: PackedBatch, parallel: Parallel, heads: dict[str, Any]
) -> Any:
    share = None
    if parallel.layout.cp > 1:
        share = ContextShare(group=parallel.cp_group, num_tokens=len(batch.tokens))
    sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen, share)
    return chunk(batch.tokens, batch.positions, sequences, **heads)


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
