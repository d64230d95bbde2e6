"""Clipped policy and value losses: values, gradients, branches, metrics."""

import math

import pytest
import torch
from torch import Tensor

from kernels import ppo_loss as ppo_module
from kernels.clipped_loss import policy_token_losses
from kernels.moments import Whitening, explained_variance, merge_moments
from kernels.ppo_loss import policy_loss, ppo_loss, value_loss
from tests.kernels.oracle import largest_difference

WHITENING = Whitening(torch.tensor(0.3), torch.tensor(1.7))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 tokens, so that several leave partial sums."""
    monkeypatch.setattr(ppo_module, "_BLOCK", 64)


def random_tokens(num_tokens: int = 200) -> tuple[Tensor, ...]:
    """new, old, target [T] around each other, and a mask with holes."""
    old, target = torch.randn(2, num_tokens)
    return old + 0.3 * torch.randn(num_tokens), old, target, torch.rand(num_tokens) < 0.7


def exact_policy(
    tokens: tuple[Tensor, ...], num_tokens: int, cliprange: float, whitening: Whitening | None
) -> dict[str, Tensor]:
    """fp64, token by token over the mask alone, the gradient by hand."""
    mask = tokens[3]
    new, old, advantage = (x.detach().double()[mask] for x in tokens[:3])
    if whitening is not None:
        advantage = (advantage - whitening.mean.double()) * whitening.rstd.double()
    ratio = (new - old).exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    is_clipped = clipped > unclipped
    gradient = torch.zeros(len(mask), dtype=torch.float64)
    gradient[mask] = torch.where(is_clipped, 0, unclipped) / num_tokens
    return {
        "loss": torch.where(is_clipped, clipped, unclipped).sum() / num_tokens,
        "clip_fraction": is_clipped.sum() / num_tokens,
        "kl_k1": (old - new).sum() / num_tokens,
        "kl_k3": (ratio - 1 - ratio.log()).sum() / num_tokens,
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "gradient": gradient,
    }


def exact_value(tokens: tuple[Tensor, ...], num_tokens: int, cliprange: float) -> dict[str, Tensor]:
    """fp64 loss, clip fraction and gradient by hand."""
    mask = tokens[3]
    new, old, target = (x.detach().double()[mask] for x in tokens[:3])
    near_old = torch.maximum(torch.minimum(new, old + cliprange), old - cliprange)
    unclipped, clipped = (new - target) ** 2, (near_old - target) ** 2
    is_clipped = clipped > unclipped
    gradient = torch.zeros(len(mask), dtype=torch.float64)
    gradient[mask] = torch.where(is_clipped, 0, new - target) / num_tokens
    return {
        "loss": 0.5 * torch.where(is_clipped, clipped, unclipped).sum() / num_tokens,
        "clip_fraction": is_clipped.sum() / num_tokens,
        "gradient": gradient,
    }


@pytest.mark.parametrize("whitening", [None, WHITENING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_loss_matches_fp64(
    backend: str, whitening: Whitening | None, dtype: torch.dtype
) -> None:
    new, old, advantages, mask = random_tokens()
    new = new.to(dtype).requires_grad_()
    tokens = (new, old, advantages, mask)
    result = policy_loss(*tokens, torch.tensor(350), cliprange=0.2, whitening=whitening)
    exact = exact_policy(tokens, 350, 0.2, whitening)
    (3 * result.loss).backward()
    gradient = exact.pop("gradient")
    assert 0 < exact["clip_fraction"] < 1, "both branches are taken"
    for name, want in exact.items():
        assert getattr(result, name).item() == pytest.approx(want.item(), abs=1e-6, rel=1e-5)
    eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert new.grad.dtype == dtype
    assert largest_difference(new.grad, 3 * gradient) < 1e-8 + eps * gradient.abs().max()


@pytest.mark.parametrize("cliprange", [0.2, math.inf])
def test_value_loss_matches_fp64(backend: str, cliprange: float) -> None:
    values, old_values, returns, mask = random_tokens()
    values.requires_grad_()
    tokens = (values, old_values, returns, mask)
    result = value_loss(*tokens, torch.tensor(350), cliprange=cliprange)
    result.loss.backward()
    exact = exact_value(tokens, 350, cliprange)
    assert (exact["clip_fraction"] > 0) == math.isfinite(cliprange)
    assert result.loss.item() == pytest.approx(exact["loss"].item(), rel=1e-6)
    assert result.clip_fraction.item() == pytest.approx(exact["clip_fraction"].item())
    assert largest_difference(values.grad, exact["gradient"]) < 1e-8


def test_both_losses_in_one_launch_are_the_two_alone(backend: str) -> None:
    policy, value = random_tokens(), random_tokens()
    mask, count = policy[3], torch.tensor(350)
    new, values = policy[0].requires_grad_(), value[0].requires_grad_()
    both = ppo_loss(
        policy[:3], value[:3], mask, count, cliprange=0.1, value_cliprange=0.3, whitening=WHITENING
    )
    (both[0].loss + 2 * both[1].loss).backward()
    grads = new.grad, values.grad
    new.grad = values.grad = None
    alone = (
        policy_loss(*policy[:3], mask, count, cliprange=0.1, whitening=WHITENING),
        value_loss(*value[:3], mask, count, cliprange=0.3),
    )
    (alone[0].loss + 2 * alone[1].loss).backward()
    for a, b in zip((*both[0], *both[1], *grads), (*alone[0], *alone[1], new.grad, values.grad),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_at_ratio_1_the_unclipped_branch_is_taken(backend: str) -> None:
    logprobs = torch.randn(5).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])
    mask = torch.ones(5) > 0
    for cliprange in (0.2, 0.0):  # with 0 the clip is a tie everywhere
        logprobs.grad = None
        result = policy_loss(
            logprobs, logprobs.detach(), advantages, mask, mask.sum(), cliprange=cliprange
        )
        result.loss.backward()
        assert torch.equal(logprobs.grad, -advantages / 5)
        assert result.clip_fraction == 0
        assert (result.ratio_min, result.ratio_max) == (1, 1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # better and already far: clipped
        (1.5, -1.0, 1.5, 1.5),  # worse and far up: still pushed down
        (0.5, 1.0, -0.5, -0.5),  # better and far down: still pushed up
        (0.5, -1.0, 0.8, 0.0),  # worse and already far down: clipped
    ],
)
def test_the_four_branches(
    backend: str, ratio: float, advantage: float, loss: float, slope: float
) -> None:
    new = torch.tensor([math.log(ratio)]).requires_grad_()
    one = torch.ones(1)
    result = policy_loss(new, torch.zeros(1), one * advantage, one > 0, torch.tensor(1))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(slope)
    assert result.clip_fraction == (slope == 0)


def test_token_loss_adds_up_to_the_policy_loss(backend: str) -> None:
    new, old, advantages, mask = random_tokens()
    leaf = new.clone().requires_grad_()
    result = policy_loss(leaf, old, advantages, mask, mask.sum(), whitening=WHITENING)
    result.loss.backward()
    rows = mask.nonzero()[:, 0].flip(0)
    losses, derivatives = policy_token_losses(
        (new[rows], old, advantages), rows, mask.sum(), whitening=WHITENING
    )
    assert losses.sum().item() == pytest.approx(result.loss.item(), abs=1e-6)
    assert largest_difference(leaf.grad[rows], derivatives) < 1e-8
    assert leaf.grad[~mask].eq(0).all()


def test_micro_batches_add_up(backend: str) -> None:
    tokens = random_tokens()
    count = tokens[3].sum()
    whole = policy_loss(*tokens, count)
    parts = [
        policy_loss(*part, count)
        for part in zip(*(x.split([130, 0, 70]) for x in tokens), strict=True)
    ]
    for i in range(4):
        assert sum(part[i].item() for part in parts) == pytest.approx(whole[i].item(), abs=1e-6)
    values = [
        value_loss(*part, count)
        for part in zip(*(x.split([130, 0, 70]) for x in tokens), strict=True)
    ]
    new, _, target, mask = (x.double() if x.is_floating_point() else x for x in tokens)
    returns, errors = (
        merge_moments(torch.stack([getattr(v, name) for v in values]))
        for name in ("return_moments", "error_moments")
    )
    want = 1 - (target - new)[mask].var() / target[mask].var()
    assert explained_variance(returns, errors).item() == pytest.approx(want.item(), abs=1e-5)


def test_nothing_outside_the_mask_is_read(backend: str) -> None:
    new, old, target, mask = random_tokens()
    dirty = [torch.where(mask, x, torch.nan).requires_grad_() for x in (new, old, target)]
    for function in (policy_loss, value_loss):
        clean = function(new, old, target, mask, mask.sum())
        result = function(*dirty, mask, mask.sum())
        assert all(torch.equal(a, b) for a, b in zip(clean, result, strict=True))
        (gradient,) = torch.autograd.grad(result.loss, dirty[:1])
        assert (gradient[~mask] == 0).all()


def test_nan_inside_the_mask_shows(backend: str) -> None:
    new, old, target, mask = random_tokens()
    new[mask.nonzero()[0]] = torch.nan
    for function in (policy_loss, value_loss):
        assert function(new, old, target, mask, mask.sum()).loss.isnan()


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_response_token_gives_zeros(backend: str, num_tokens: int) -> None:
    new, old, target = (torch.randn(num_tokens).requires_grad_() for _ in range(3))
    mask = torch.zeros(num_tokens) > 0
    policy, value = ppo_loss((new, old, target), (new, old, target), mask, torch.tensor(0))
    (policy.loss + value.loss).backward()
    assert [x.item() for x in policy] == [0, 0, 0, 0, 1, 1]
    assert all((x == 0).all() for x in value)
    assert (new.grad == 0).all()


def test_gradcheck(backend: str) -> None:
    # Ratios and values away from the clip's edges, where the loss has no derivative.
    old = torch.randn(7, dtype=torch.float64)
    difference = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.4, -0.4], dtype=torch.float64)
    target, mask = torch.randn(7, dtype=torch.float64), torch.arange(7) != 1
    new = (old + difference).requires_grad_()

    def losses(logprobs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        results = ppo_loss((logprobs, old, target), (values, old, target), mask, torch.tensor(9))
        return results[0].loss, results[1].loss

    assert torch.autograd.gradcheck(losses, (new, new.detach().clone().requires_grad_()))


def test_repeats_bit_for_bit(backend: str) -> None:
    tokens = random_tokens(500)
    runs = [policy_loss(*tokens, torch.tensor(350)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    tokens = random_tokens()
    count = torch.tensor(350)
    compiled = torch.compile(lambda *x: policy_loss(*x, count).loss, backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    leaves = [tokens[0].clone().requires_grad_() for _ in range(2)]
    losses = [compiled(leaves[0], *tokens[1:]), policy_loss(leaves[1], *tokens[1:], count).loss]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 1023, 131072, 3_000_001])
def test_on_a_gpu(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    policy, value = random_tokens(num_tokens), random_tokens(num_tokens)
    policy[3][0] = True
    count = policy[3].sum()
    inputs = [[x.cuda().requires_grad_() for x in part[:3]] for part in (policy, value)]
    mask, count_on_gpu = policy[3].cuda(), count.cuda()
    ppo_loss(*inputs, mask, count_on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    runs = []
    for _ in range(20):
        results = ppo_loss(*inputs, mask, count_on_gpu)
        loss = results[0].loss + results[1].loss
        runs.append((loss, *torch.autograd.grad(loss, [part[0] for part in inputs])))
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    exact = exact_policy(policy, count, 0.2, None), exact_value((*value[:3], policy[3]), count, 0.2)
    assert runs[0][0].item() == pytest.approx(sum(e["loss"].item() for e in exact), rel=1e-5)
    for gradient, want in zip(runs[0][1:], exact, strict=True):
        assert largest_difference(gradient.cpu(), want["gradient"]) < 1e-6
