"""The clipped value loss: values, gradients, clip, and the moments of its metrics."""

import math

import pytest
import torch
from torch import Tensor

from kernels import value_loss as value_module
from kernels.moments import merge_moments
from kernels.value_loss import value_loss
from tests.kernels.oracle import largest_difference


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 tokens, so that several leave partial sums."""
    monkeypatch.setattr(value_module, "_BLOCK", 64)


def random_tokens(num_tokens: int = 200) -> tuple[Tensor, ...]:
    """values, old values, returns [T] around each other, and a mask with holes."""
    old, target = torch.randn(2, num_tokens)
    return old + 0.3 * torch.randn(num_tokens), old, target, torch.rand(num_tokens) < 0.7


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


@pytest.mark.parametrize("cliprange", [0.2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss_matches_fp64(backend: str, cliprange: float, dtype: torch.dtype) -> None:
    values, *rest = random_tokens()
    values = values.to(dtype).requires_grad_()
    tokens = (values, *rest)
    result = value_loss(*tokens, torch.tensor(350), cliprange=cliprange)
    (3 * result.loss).backward()
    exact = exact_value(tokens, 350, cliprange)
    assert (exact["clip_fraction"] > 0) == math.isfinite(cliprange)
    assert result.loss.item() == pytest.approx(exact["loss"].item(), rel=1e-6)
    assert result.clip_fraction.item() == pytest.approx(exact["clip_fraction"].item())
    gradient = 3 * exact["gradient"]
    eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert values.grad.dtype == dtype
    assert largest_difference(values.grad, gradient) < 1e-8 + eps * gradient.abs().max()


def test_micro_batches_add_up(backend: str) -> None:
    tokens = random_tokens()
    count = tokens[3].sum()
    whole = value_loss(*tokens, count)
    parts = [
        value_loss(*part, count)
        for part in zip(*(x.split([130, 0, 70]) for x in tokens), strict=True)
    ]
    for i in range(2):
        assert sum(part[i].item() for part in parts) == pytest.approx(whole[i].item(), abs=1e-6)
    new, _, target, mask = (x.double() if x.is_floating_point() else x for x in tokens)
    returns, errors = (
        merge_moments(torch.stack([getattr(part, name) for part in parts]))
        for name in ("return_moments", "error_moments")
    )
    for found, exact in ((returns, target), (errors, target - new)):
        assert found[0] == count
        assert found[1].item() == pytest.approx(exact[mask].mean().item(), abs=1e-6)
        assert found[2].item() == pytest.approx((count - 1).item() * exact[mask].var().item())


def test_nothing_outside_the_mask_is_read(backend: str) -> None:
    *tokens, mask = random_tokens()
    dirty = [torch.where(mask, x, torch.nan).requires_grad_() for x in tokens]
    clean = value_loss(*tokens, mask, mask.sum())
    result = value_loss(*dirty, mask, mask.sum())
    assert all(torch.equal(a, b) for a, b in zip(clean, result, strict=True))
    (gradient,) = torch.autograd.grad(result.loss, dirty[:1])
    assert (gradient[~mask] == 0).all()


def test_nan_inside_the_mask_shows(backend: str) -> None:
    values, *rest = random_tokens()
    values[rest[-1].nonzero()[0]] = torch.nan
    assert value_loss(values, *rest, torch.tensor(9)).loss.isnan()


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_response_token_gives_zeros(backend: str, num_tokens: int) -> None:
    values, old, target = (torch.randn(num_tokens).requires_grad_() for _ in range(3))
    result = value_loss(values, old, target, torch.zeros(num_tokens) > 0, torch.tensor(0))
    result.loss.backward()
    assert all((x == 0).all() for x in result)
    assert (values.grad == 0).all()


def test_gradcheck(backend: str) -> None:
    # Values away from the clip's edges, where the loss has no derivative.
    old = torch.randn(7, dtype=torch.float64)
    difference = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.4, -0.4], dtype=torch.float64)
    target, mask = torch.randn(7, dtype=torch.float64), torch.arange(7) != 1

    def loss(values: Tensor) -> Tensor:
        return value_loss(values, old, target, mask, torch.tensor(9)).loss

    assert torch.autograd.gradcheck(loss, ((old + difference).requires_grad_(),))


def test_repeats_bit_for_bit(backend: str) -> None:
    tokens = random_tokens(500)
    runs = [value_loss(*tokens, torch.tensor(350)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    values, *rest = random_tokens()
    count = torch.tensor(350)
    compiled = torch.compile(lambda *x: value_loss(*x, count).loss, backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    losses = [compiled(leaves[0], *rest), value_loss(leaves[1], *rest, count).loss]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 1023, 131072, 3_000_001])
def test_on_a_gpu(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tokens = random_tokens(num_tokens)
    tokens[3][0] = True
    *inputs, mask = (x.cuda() for x in tokens)
    values, count = inputs[0].requires_grad_(), mask.sum()
    value_loss(*inputs, mask, count)
    torch.cuda.set_sync_debug_mode("error")
    runs = []
    for _ in range(20):
        loss = value_loss(*inputs, mask, count).loss
        runs.append((loss, *torch.autograd.grad(loss, values)))
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    exact = exact_value(tokens, int(count), 0.2)
    assert runs[0][0].item() == pytest.approx(exact["loss"].item(), rel=1e-5)
    assert largest_difference(runs[0][1].cpu(), exact["gradient"]) < 1e-6
