"""Reward-model loss over all pairs of a prompt's completions, with pair accuracy.

    loss_p = 1 / C(K, 2)  sum over pairs (w better than l) of  -log sigmoid(s_w - s_l)

InstructGPT eq. 1, for one prompt p with K completions. Rank 1 is best. Completions of equal rank
make no pair, and K counts them all the same: a prompt with ties weighs less, not more.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import uses_triton
from kernels.precision import accumulation_dtype, triton_dtype
from kernels.traced import traced

_BLOCK = 16  # completions on a side of a tile of pairs; InstructGPT has at most 9


class RankingLoss(NamedTuple):
    """[P] tensors, one entry a prompt; divide their sums by global counts."""

    losses: Tensor
    """Differentiable in the scores; 0 for a prompt without pairs."""
    num_correct: Tensor
    """Pairs whose scores agree with the ranks, as a float; equal scores count one half."""
    num_pairs: Tensor
    """Pairs of different rank, as a float."""


@triton.jit
def _ranking_kernel(
    results,  # [3, P] loss, correct pairs, pairs
    derivative,  # [N] d losses[its prompt] / d score
    scores,
    ranks,  # [N]
    cu_prompts,  # [P+1]
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a prompt, over [BLOCK, BLOCK] tiles of pairs, row i against column j.
    prompt = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_prompts + prompt).to(tl.int64)
    num_completions = tl.load(cu_prompts + prompt + 1).to(tl.int64) - start
    all_pairs = (num_completions * (num_completions - 1) // 2).to(ACC)
    scale = 1.0 / tl.maximum(all_pairs, 1.0)
    lane = tl.arange(0, BLOCK)
    loss = tl.full((), 0.0, ACC)
    num_correct = tl.full((), 0.0, ACC)
    num_pairs = tl.full((), 0.0, ACC)
    for first_i in range(0, num_completions, BLOCK):
        i = first_i + lane
        score_i = tl.load(scores + start + i, mask=i < num_completions, other=0.0).to(ACC)
        rank_i = tl.load(ranks + start + i, mask=i < num_completions, other=0)
        row_derivative = tl.zeros((BLOCK,), ACC)
        for first_j in range(0, num_completions, BLOCK):
            j = first_j + lane
            score_j = tl.load(scores + start + j, mask=j < num_completions, other=0.0).to(ACC)
            rank_j = tl.load(ranks + start + j, mask=j < num_completions, other=0)
            both = (i < num_completions)[:, None] & (j < num_completions)[None, :]
            is_better = both & (rank_i[:, None] < rank_j[None, :])
            is_worse = both & (rank_i[:, None] > rank_j[None, :])
            difference = score_i[:, None] - score_j[None, :]
            margin = tl.where(is_worse, -difference, difference)  # better - worse
            # -log sigmoid(x) = max(-x, 0) + log(1 + e^-|x|); its derivative is -sigmoid(-x).
            decay = tl.exp(-tl.abs(margin))
            log_sigmoid = tl.minimum(margin, 0.0) - tl.log(1.0 + decay)
            loss -= tl.sum(tl.where(is_better, log_sigmoid, 0.0))
            correct = tl.where(margin == 0, 0.5, tl.where(margin > 0, 1.0, 0.0)).to(ACC)
            num_correct += tl.sum(tl.where(is_better, correct, 0.0))
            num_pairs += tl.sum(is_better.to(ACC))
            slope = tl.where(margin > 0, decay, 1.0) / (1.0 + decay)
            slope = tl.where(is_worse, slope, tl.where(is_better, -slope, 0.0))
            row_derivative += tl.sum(slope, axis=1)
        tl.store(derivative + start + i, row_derivative * scale, mask=i < num_completions)
    num_prompts = tl.num_programs(0)
    tl.store(results + prompt, loss * scale)
    tl.store(results + num_prompts + prompt, num_correct)
    tl.store(results + 2 * num_prompts + prompt, num_pairs)


@traced("trident::ranking_loss")
def _ranking_loss(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """([3, P] losses, correct pairs, pairs; [N] derivative of the own prompt's loss)."""
    dtype = accumulation_dtype(scores.dtype)
    num_prompts = len(cu_prompts) - 1
    results = torch.empty(3, num_prompts, dtype=dtype, device=scores.device)
    derivative = torch.empty(len(scores), dtype=dtype, device=scores.device)
    if num_prompts > 0:
        with torch.cuda.device_of(scores):
            _ranking_kernel[(num_prompts,)](
                results,
                derivative,
                scores.contiguous(),
                ranks.contiguous(),
                cu_prompts.contiguous(),
                ACC=triton_dtype(dtype),
                BLOCK=_BLOCK,
                num_warps=1,
            )
    return results, derivative


@_ranking_loss.register_fake
def _(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(scores.dtype)
    results = scores.new_empty(3, len(cu_prompts) - 1, dtype=dtype)
    return results, torch.empty_like(scores, dtype=dtype)


class _RankingLoss(torch.autograd.Function):
    """scores to (losses [P], counts [2, P]); keeps the derivative."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, ranks: Tensor, cu_prompts: Tensor
    ) -> tuple[Tensor, Tensor]:
        results, derivative = _ranking_loss(scores, ranks, cu_prompts)
        ctx.save_for_backward(derivative, cu_prompts)
        ctx.dtype = scores.dtype
        losses, counts = results[0].clone(), results[1:].clone()
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        derivative, cu_prompts = ctx.saved_tensors
        # The known output size spares the host a wait for the device.
        own = grad.repeat_interleave(cu_prompts.diff(), output_size=len(derivative))
        return (own * derivative).to(ctx.dtype), None, None


def ranking_loss_reference(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> RankingLoss:
    """`ranking_loss` in plain torch: the specification and the CPU path."""
    dtype = accumulation_dtype(scores.dtype)
    num_completions = cu_prompts.diff()  # [P]
    most = int(num_completions.max()) if num_completions.numel() else 0
    column = torch.arange(most, device=scores.device)
    inside = column < num_completions[:, None]  # [P, K]
    index = torch.where(inside, cu_prompts[:-1, None] + column, 0)
    score, rank = scores.to(dtype)[index], ranks[index]

    # [P, K, K]: row better than column
    is_pair = inside[:, :, None] & inside[:, None, :] & (rank[:, :, None] < rank[:, None, :])
    margin = torch.where(is_pair, score[:, :, None] - score[:, None, :], 0)
    total = torch.where(is_pair, -F.logsigmoid(margin), 0).sum((1, 2))
    all_pairs = (num_completions * (num_completions - 1) // 2).clamp(min=1)
    correct = (margin > 0).to(dtype) + 0.5 * (margin == 0).to(dtype)
    return RankingLoss(
        losses=total / all_pairs,
        num_correct=torch.where(is_pair, correct, 0).sum((1, 2)),
        num_pairs=is_pair.sum((1, 2)).to(dtype),
    )


def ranking_loss(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> RankingLoss:
    """Loss of each prompt, divided by C(K, 2), and its pair counts.

    scores, ranks [N] (rank 1 best, ties allowed); cu_prompts [P+1] int32: the completions of prompt
    p are cu_prompts[p] to cu_prompts[p+1], and cu_prompts[P] == N.
    """
    if not uses_triton(scores):
        return ranking_loss_reference(scores, ranks, cu_prompts)
    losses, counts = _RankingLoss.apply(scores, ranks, cu_prompts)
    return RankingLoss(losses, *counts.unbind())
