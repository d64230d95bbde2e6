"""The reward model's loss over all pairs of K completions of each of P prompts."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Cost,
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    compiled,
    plain,
    weighted_sum,
)
from kernels.ranking_loss import ranking_loss

_SIZES = {
    "cuda": [{"prompts": 64, "completions": 9}, {"prompts": 512, "completions": 9}],
    "cpu": [{"prompts": 16, "completions": 4}, {"prompts": 64, "completions": 9}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    num_prompts, num_completions = size["prompts"], size["completions"]
    shape = (num_prompts, num_completions)
    starts = torch.arange(0, num_prompts * num_completions + 1, num_completions, device=device)
    return {
        "scores": torch.randn(shape, device=device).flatten(),
        "ranks": torch.rand(shape, device=device).argsort(1).flatten(),
        "cu_prompts": starts.int(),
        "upstream": {"losses": torch.randn(num_prompts, device=device)},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    scores = inputs["scores"].detach().double().requires_grad_()
    losses = _all_pairs(scores, inputs["ranks"], inputs["cu_prompts"])[0]
    total = weighted_sum({"losses": losses}, inputs["upstream"])
    (gradient,) = torch.autograd.grad(total, scores)
    return {
        "losses": Expected(losses.detach(), 1e-4),
        "scores_grad": Expected(gradient, 1e-3, is_relative=True),
    }


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    return Cost(num_bytes=inputs["scores"].nbytes * 2 + inputs["ranks"].nbytes)


def _ours(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> tuple[Tensor, Tensor]:
    result = ranking_loss(scores, ranks, cu_prompts)
    return result.losses, result.num_correct


def _all_pairs(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """[P, K, K] differences at once, for equal numbers of completions."""
    shape = (len(cu_prompts) - 1, -1)
    score, rank = scores.view(shape), ranks.view(shape)
    is_pair = rank[:, :, None] < rank[:, None, :]
    margin = score[:, :, None] - score[:, None, :]
    loss = torch.where(is_pair, -F.logsigmoid(margin), 0).sum((1, 2))
    num_pairs = score.shape[1] * (score.shape[1] - 1) // 2
    return loss / num_pairs, (is_pair & (margin > 0)).sum((1, 2))


def _pair_by_pair(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt at a time and a pair at a time, best completion first: the textbook loop."""
    num_prompts = len(cu_prompts) - 1
    num_completions = len(scores) // num_prompts
    losses, num_correct = [], []
    for score, rank in zip(scores.view(num_prompts, -1), ranks.view(num_prompts, -1), strict=True):
        ordered = score[rank.argsort()]
        margins = [
            ordered[better] - ordered[worse]
            for better, worse in itertools.combinations(range(num_completions), 2)
        ]
        margin = torch.stack(margins)
        losses.append(-F.logsigmoid(margin).mean())
        num_correct.append((margin > 0).sum())
    return torch.stack(losses), torch.stack(num_correct)


RANKING_LOSS = Operation(
    name="ranking_loss",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("scores", "ranks", "cu_prompts"),
    outputs=("losses", "num_correct"),
    gradients=("scores",),
    modes=("forward+backward",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("torch, all pairs", plain(_all_pairs)),
        Provider("torch.compile", compiled(_all_pairs), needs_gpu=True),
        Provider("loop over pairs", plain(_pair_by_pair)),
    ),
)
