"""All-pairs ranking loss against a loop over pairs."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ranking_loss import RankingLoss, ranking_loss
from tests.kernels.oracle import largest_difference

# One prompt of each size: 0, 1, InstructGPT's 4 to 9, and more than one tile of 16.
SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 1, 0, 16, 17, 35)


def random_comparisons(sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ranks with ties, and the prompts' boundaries."""
    num_completions = sum(sizes)
    scores = 3 * torch.randn(num_completions)
    ranks = torch.randint(1, 6, (num_completions,))
    return scores, ranks, torch.tensor((0, *sizes)).cumsum(0).to(torch.int32)


def exact_ranking(scores: Tensor, ranks: Tensor, cu_prompts: Tensor) -> RankingLoss:
    """fp64, one pair at a time."""
    rows = []
    for start, end in zip(cu_prompts.tolist(), cu_prompts.tolist()[1:], strict=False):
        loss = scores.double()[start:end].sum() * 0
        correct = pairs = 0.0
        for i, j in combinations(range(start, end), 2):
            if ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            margin = scores[better].double() - scores[worse].double()
            loss = loss - F.logsigmoid(margin)
            correct += 0.5 if margin == 0 else float(margin > 0)
            pairs += 1
        size = end - start
        rows.append((loss / max(1, size * (size - 1) // 2), correct, pairs))
    losses, correct, pairs = zip(*rows, strict=True)
    return RankingLoss(torch.stack(losses), torch.tensor(correct), torch.tensor(pairs))


def test_matches_the_loop_over_pairs(backend: str) -> None:
    scores, ranks, cu_prompts = random_comparisons()
    scores[5:8] = 0.25  # equal scores of different ranks
    leaf, exact_leaf = (scores.clone().requires_grad_() for _ in range(2))
    result, exact = (
        ranking_loss(leaf, ranks, cu_prompts),
        exact_ranking(exact_leaf, ranks, cu_prompts),
    )
    assert largest_difference(result.losses, exact.losses) < 1e-6
    assert torch.equal(result.num_correct, exact.num_correct)
    assert torch.equal(result.num_pairs, exact.num_pairs)
    upstream = torch.randn(len(SIZES))
    (got,) = torch.autograd.grad(result.losses, leaf, upstream)
    (want,) = torch.autograd.grad(exact.losses, exact_leaf, upstream.double())
    assert largest_difference(got, want) < 1e-6


def test_one_pair_by_hand(backend: str) -> None:
    scores = torch.tensor([1.0, 3.0]).requires_grad_()
    result = ranking_loss(scores, torch.tensor([2, 1]), torch.tensor([0, 2], dtype=torch.int32))
    result.losses.sum().backward()
    assert result.losses.item() == pytest.approx(0.126928, abs=1e-6)  # log(1 + e^-2)
    assert scores.grad.tolist() == pytest.approx([0.119203, -0.119203], abs=1e-6)


def test_ties_make_no_pair_but_count_in_the_divisor(backend: str) -> None:
    cu_prompts = torch.tensor([0, 3], dtype=torch.int32)
    scores = torch.tensor([1.0, 3.0, 1.0])
    one_tie = ranking_loss(scores, torch.tensor([2, 1, 2]), cu_prompts)
    assert one_tie.num_pairs == 2
    assert one_tie.losses.item() == pytest.approx(2 * 0.126928 / 3, abs=1e-6)
    all_ties = ranking_loss(scores.requires_grad_(), torch.ones(3, dtype=torch.int64), cu_prompts)
    all_ties.losses.sum().backward()
    assert [x.item() for x in all_ties] == [0, 0, 0]
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("sizes", [(), (1, 1), (0, 0)])
def test_without_pairs_there_is_no_loss(backend: str, sizes: tuple[int, ...]) -> None:
    scores, ranks, cu_prompts = random_comparisons(sizes)
    result = ranking_loss(scores.requires_grad_(), ranks, cu_prompts)
    result.losses.sum().backward()
    assert all((x == 0).all() and len(x) == len(sizes) for x in result)
    assert (scores.grad == 0).all()


def test_extreme_margins_stay_finite(backend: str) -> None:
    scores = torch.tensor([1e4, -1e4, 0.0]).requires_grad_()
    result = ranking_loss(scores, torch.tensor([2, 1, 3]), torch.tensor([0, 3], dtype=torch.int32))
    result.losses.sum().backward()
    assert result.losses.item() == pytest.approx((2e4 + 0 + 1e4) / 3)
    assert scores.grad.tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_shifting_all_scores_changes_nothing_and_gradients_sum_to_zero(backend: str) -> None:
    scores, ranks, cu_prompts = random_comparisons()
    leaf = scores.clone().requires_grad_()
    result = ranking_loss(leaf, ranks, cu_prompts)
    result.losses.sum().backward()
    shifted = ranking_loss(scores + 64, ranks, cu_prompts)
    assert largest_difference(result.losses, shifted.losses) < 1e-4
    per_prompt = [x.sum().abs() for x in leaf.grad.split(list(SIZES))]
    assert max(per_prompt) < 1e-6


def test_nan_stays_in_its_prompt(backend: str) -> None:
    scores, ranks, cu_prompts = random_comparisons((4, 4, 4))
    ranks = torch.arange(12)
    scores[5] = torch.nan
    result = ranking_loss(scores, ranks, cu_prompts)
    assert result.losses.isnan().tolist() == [False, True, False]


def test_gradcheck(backend: str) -> None:
    _, ranks, cu_prompts = random_comparisons((3, 1, 5))
    scores = torch.randn(9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, ranks, cu_prompts).losses, scores)


def test_bf16_scores_and_repeats_bit_for_bit(backend: str) -> None:
    scores, ranks, cu_prompts = random_comparisons()
    leaf = scores.bfloat16().requires_grad_()
    runs = [ranking_loss(leaf, ranks, cu_prompts) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0].losses.dtype == torch.float32
    assert largest_difference(runs[0].losses, exact_ranking(leaf, ranks, cu_prompts).losses) < 1e-6
    assert torch.autograd.grad(runs[0].losses.sum(), leaf)[0].dtype == torch.bfloat16


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    scores, ranks, cu_prompts = random_comparisons((3, 4))
    compiled = torch.compile(
        lambda *x: ranking_loss(*x).losses.sum(), backend="aot_eager", fullgraph=True
    )
    leaves = [scores.clone().requires_grad_() for _ in range(2)]
    compiled(leaves[0], ranks, cu_prompts).backward()
    ranking_loss(leaves[1], ranks, cu_prompts).losses.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    sizes = SIZES * 100
    scores, ranks, cu_prompts = random_comparisons(sizes)
    exact_leaf = scores.double().requires_grad_()
    exact = ranking_loss(exact_leaf, ranks, cu_prompts)
    upstream = torch.randn(len(sizes))
    (want,) = torch.autograd.grad(exact.losses, exact_leaf, upstream.double())
    leaf, ranks, cu_prompts, upstream = (
        scores.cuda().requires_grad_(), ranks.cuda(), cu_prompts.cuda(), upstream.cuda()
    )  # fmt: skip
    ranking_loss(leaf, ranks, cu_prompts)
    torch.cuda.set_sync_debug_mode("error")
    result = ranking_loss(leaf, ranks, cu_prompts)
    (got,) = torch.autograd.grad(result.losses, leaf, upstream)
    torch.cuda.set_sync_debug_mode("default")
    assert largest_difference(result.losses.cpu(), exact.losses) < 1e-6
    assert torch.equal(result.num_correct.cpu(), exact.num_correct.float())
    assert largest_difference(got.cpu(), want) < 1e-6
