"""The losses of the three stages over packed micro-batches.

Each function closes over a global count and returns what engine/training/passes.py wants: a
micro-batch's share of the loss. The shares add up to the loss of the global batch, whatever the
packing or layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.batches import PackedBatch, Units
from engine.feed import pack_for, step_batch
from engine.training.network import Network
from engine.training.passes import ScalarLoss, forward
from engine.training.reduce import StepMetrics
from kernels.linear_logprobs import ProportionalLoss, TokenLoss
from kernels.moments import Whitening
from kernels.policy_loss import policy_metrics, policy_token_losses
from kernels.ranking_loss import ranking_loss
from kernels.value_loss import value_loss
from models.readouts import shift_right


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-sum of log-probs / num_targets: the mean over the global batch's predicted tokens, in
    nats."""

    num_targets: int
    name: str = "loss"
    """Key of the loss among the metrics."""

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return the losses of tokens from their log-probs, and the derivative they share."""
        return ProportionalLoss(torch.full((), -1 / self.num_targets, device=batch.mask.device))

    def metrics(self, batch: PackedBatch, logprobs: Tensor) -> StepMetrics:
        """Return the micro-batch's share of the loss."""
        return {self.name: -logprobs.masked_fill(~batch.mask, 0.0).sum() / self.num_targets}


def comparison_loss(num_prompts: int) -> ScalarLoss:
    """Return the ranking loss (InstructGPT eq. 1), mean over the global batch's prompts."""

    def loss_function(batch: PackedBatch, readings: Tensor) -> tuple[Tensor, StepMetrics]:
        scores = last_readings(readings, batch.cu_seqlens)[: batch.num_sequences]
        result = ranking_loss(scores, batch.fields["ranks"][: batch.num_sequences], batch.cu_units)
        # A filler micro-batch has no prompt: an empty sum keeps its (zero) gradient path.
        loss = result.losses.sum() / num_prompts + 0.0 * readings.sum()
        detached = scores.detach()
        return loss, {
            "loss": loss.detach(),
            "num_correct": result.num_correct.sum(),
            "num_pairs": result.num_pairs.sum(),
            "score_sum": detached.sum(),
            "score_square_sum": detached.square().sum(),
            "num_scores": detached.new_tensor(len(detached)),
        }

    return loss_function


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), mean over the minibatch's response
    tokens."""

    num_targets: Tensor
    cliprange: float
    whitening: Whitening | None

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return max(-A ratio, -A clip(ratio)) / num_targets of tokens from their log-probs, its
        derivatives, and the terms [3, n] of which the metrics are made."""
        old_logprobs, advantages = batch.fields["logprobs"], batch.fields["advantages"]

        return lambda logprobs, positions: policy_token_losses(
            (logprobs, old_logprobs, advantages),
            positions,
            self.num_targets,
            cliprange=self.cliprange,
            whitening=self.whitening,
        )

    def metrics(self, batch: PackedBatch, terms: Tensor) -> StepMetrics:
        """Return loss, clip fraction, KL from the old policy and the extremes of the ratio.

        terms: [3, T], those of the token loss at all tokens of the micro-batch.
        """
        result = policy_metrics(terms, batch.mask, self.num_targets)
        return {
            "policy_loss": result.loss,
            "clip_fraction": result.clip_fraction,
            "approx_kl": result.kl_k3,
            "ratio_min": result.ratio_min,
            "ratio_max": result.ratio_max,
        }


def clipped_value_loss(num_targets: Tensor, *, cliprange: float | None) -> ScalarLoss:
    """Return 0.5 x the clipped squared error of the values, mean over the minibatch's response
    tokens."""

    def loss_function(batch: PackedBatch, readings: Tensor) -> tuple[Tensor, StepMetrics]:
        result = value_loss(
            shift_right(readings),
            batch.fields["values"],
            batch.fields["returns"],
            batch.mask,
            num_targets,
            cliprange=math.inf if cliprange is None else cliprange,
        )
        return result.loss, {
            "value_loss": result.loss.detach(),
            "value_clip_fraction": result.clip_fraction,
            "return_moments": result.return_moments,
            "error_moments": result.error_moments,
        }

    return loss_function


def last_readings(readings: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the reading [B] at the last token of every sequence: a reward model's scores.

    readings: [T]; cu_seqlens: [B+1].
    """
    return readings[cu_seqlens[1:].long() - 1]


@torch.no_grad()
def mean_language_loss(network: Network, units: Units, micro_batch_tokens: int) -> float:
    """Return the mean loss a predicted token over held-out units, dropout off, the same on every
    rank."""
    parallel = network.parallel
    held_out = step_batch(units, parallel, micro_batch_tokens)
    total = torch.zeros((), device=parallel.device, dtype=torch.float64)
    with network.evaluating():
        outputs = forward(network, held_out.batches)
    for batch, logprobs in zip(held_out.batches, outputs, strict=True):
        total -= logprobs[batch.mask].double().sum()
    dist.all_reduce(total, group=parallel.dp_group)
    return float(total) / held_out.num_targets


def pair_accuracy(
    network: Network, units: Sequence, micro_batch_tokens: int, *, share_prompts: bool = False
) -> tuple[float, float]:
    """Return (ranking loss, share of pairs in the right order) of held-out comparisons; equal
    scores count half. share_prompts: as engine/feed.Feed."""
    parallel = network.parallel
    batches = pack_for(units, parallel, micro_batch_tokens, share_prompts=share_prompts)
    loss_function = comparison_loss(len(units))
    totals = torch.zeros(3, device=parallel.device, dtype=torch.float64)
    with network.evaluating():
        for batch, readings in zip(batches, forward(network, batches), strict=True):
            if batch.num_sequences:
                _, found = loss_function(batch, readings)
                totals += torch.stack([found["loss"], found["num_correct"], found["num_pairs"]])
    dist.all_reduce(totals, group=parallel.dp_group)
    loss, num_correct, num_pairs = totals.tolist()
    return loss, num_correct / max(num_pairs, 1.0)
