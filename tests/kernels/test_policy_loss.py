"""The clipped policy loss: values, gradients, branches, and metrics from the same pass."""

import math

import pytest
import torch
from torch import Tensor

from kernels import policy_loss as policy_module
from kernels.linear_logprobs import linear_logprobs_loss
from kernels.moments import Whitening
from kernels.policy_loss import PolicyMetrics, policy_metrics, policy_token_losses
from tests.kernels.oracle import largest_difference

WHITENING = Whitening(torch.tensor(0.3), torch.tensor(1.7))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 tokens, so that several leave partial sums."""
    monkeypatch.setattr(policy_module, "_METRICS_BLOCK", 64)


def random_tokens(num_tokens: int = 200) -> tuple[Tensor, ...]:
    """new, old, advantages [T] around each other, and a mask with holes."""
    old, advantages = torch.randn(2, num_tokens)
    return old + 0.3 * torch.randn(num_tokens), old, advantages, torch.rand(num_tokens) < 0.7


def losses_and_metrics(
    tokens: tuple[Tensor, ...],
    num_tokens: Tensor,
    *,
    cliprange: float = 0.2,
    whitening: Whitening | None = None,
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """Summed loss, derivatives [T] and metrics, each token's computed among the mask's alone."""
    new, old, advantages, mask = tokens
    rows = mask.nonzero()[:, 0]
    losses, derivatives, terms = policy_token_losses(
        (new[rows], old, advantages), rows, num_tokens, cliprange=cliprange, whitening=whitening
    )
    of_all = terms.new_zeros(3, len(mask)).index_copy(1, rows, terms)
    spread = derivatives.new_zeros(len(mask)).index_copy(0, rows, derivatives)
    return losses.sum(), spread, policy_metrics(of_all, mask, num_tokens)


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
        "kl_k3": (ratio - 1 - ratio.log()).sum() / num_tokens,
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "gradient": gradient,
    }


@pytest.mark.parametrize("whitening", [None, WHITENING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_gradient_and_metrics_match_fp64(
    backend: str, whitening: Whitening | None, dtype: torch.dtype
) -> None:
    new, *rest = random_tokens()
    tokens = (new.to(dtype), *rest)
    loss, gradient, metrics = losses_and_metrics(tokens, torch.tensor(350), whitening=whitening)
    exact = exact_policy(tokens, 350, 0.2, whitening)
    assert gradient.dtype == torch.float32
    assert largest_difference(gradient, exact.pop("gradient")) < 1e-8
    assert loss.item() == pytest.approx(exact["loss"].item(), rel=1e-5)
    assert 0 < exact["clip_fraction"] < 1, "both branches are taken"
    for name, want in exact.items():
        assert getattr(metrics, name).item() == pytest.approx(want.item(), abs=1e-6, rel=1e-5)


def test_at_ratio_1_the_unclipped_branch_is_taken(backend: str) -> None:
    logprobs = torch.randn(5)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])
    tokens = (logprobs, logprobs, advantages, torch.ones(5) > 0)
    for cliprange in (0.2, 0.0):  # with 0 the clip is a tie everywhere
        _, gradient, metrics = losses_and_metrics(tokens, torch.tensor(5), cliprange=cliprange)
        assert torch.equal(gradient, -advantages / 5)
        assert metrics.clip_fraction == 0
        assert (metrics.ratio_min, metrics.ratio_max) == (1, 1)


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
    one = torch.ones(1)
    tokens = (one * math.log(ratio), one * 0, one * advantage, one > 0)
    total, gradient, metrics = losses_and_metrics(tokens, torch.tensor(1))
    assert total.item() == metrics.loss.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)
    assert metrics.clip_fraction == (slope == 0)


def test_micro_batches_add_up(backend: str) -> None:
    tokens = random_tokens()
    count = tokens[3].sum()
    whole = losses_and_metrics(tokens, count)[2]
    parts = [
        losses_and_metrics(part, count)[2]
        for part in zip(*(x.split([130, 0, 70]) for x in tokens), strict=True)
    ]
    for i in range(3):
        assert sum(part[i].item() for part in parts) == pytest.approx(whole[i].item(), abs=1e-6)
    assert min(part.ratio_min for part in parts) == whole.ratio_min
    assert max(part.ratio_max for part in parts) == whole.ratio_max


def test_the_head_hands_on_the_terms_of_every_chunk(backend: str) -> None:
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (40, 30))
    tokens, mask = torch.randint(0, 30, (40,)), torch.rand(40) < 0.6
    old, advantages = torch.randn(2, 40)
    labels, count = tokens.masked_fill(~mask, -100), mask.sum()

    def token_loss(logprobs: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return policy_token_losses((logprobs, old - 4, advantages), rows, count)

    results = []
    for chunk_rows in (40, 7):
        loss, terms = linear_logprobs_loss(
            hidden, weight, labels, token_loss, workspace_bytes=4 * 30 * chunk_rows
        )
        assert terms.shape == (3, 40) and not terms.requires_grad
        assert terms[:, ~mask].eq(0).all()
        metrics = policy_metrics(terms, mask, count)
        assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        results.append((terms, *metrics))
    for one_chunk, many in zip(*results, strict=True):
        assert torch.allclose(one_chunk, many, atol=1e-6)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    want = (logprobs - (old - 4)).masked_fill(~mask, 0)
    assert largest_difference(results[0][0][1], want) < 2e-6


def test_a_head_without_rows_still_gives_terms(backend: str) -> None:
    hidden, weight, old = torch.randn(5, 8), torch.randn(30, 8), torch.randn(5)
    labels, one = torch.full((5,), -100), torch.tensor(1)

    def token_loss(logprobs: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return policy_token_losses((logprobs, old, old), rows, one)

    loss, terms = linear_logprobs_loss(hidden, weight, labels, token_loss)
    assert loss == 0
    assert terms.shape == (3, 5)
    assert terms.eq(0).all()


def test_nothing_outside_the_mask_is_read(backend: str) -> None:
    *tokens, mask = random_tokens()
    everywhere = torch.arange(len(mask))
    terms = policy_token_losses(tuple(tokens), everywhere, mask.sum())[2]
    dirty = torch.where(mask, terms, torch.nan)
    for clean, got in zip(
        policy_metrics(terms, mask, mask.sum()),
        policy_metrics(dirty, mask, mask.sum()),
        strict=True,
    ):
        assert torch.equal(clean, got)


def test_nan_inside_the_mask_shows(backend: str) -> None:
    new, *rest = random_tokens()
    new[rest[-1].nonzero()[0]] = torch.nan
    loss, gradient, metrics = losses_and_metrics((new, *rest), torch.tensor(9))
    assert loss.isnan()
    assert gradient.isnan().sum() == 1
    assert metrics.loss.isnan()
    assert metrics.kl_k3.isnan()


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_response_token_gives_zeros(backend: str, num_tokens: int) -> None:
    tokens = [torch.randn(num_tokens) for _ in range(3)]
    mask = torch.zeros(num_tokens) > 0
    loss, _, metrics = losses_and_metrics((*tokens, mask), torch.tensor(0))
    assert loss == 0
    assert [x.item() for x in metrics] == [0, 0, 0, 1, 1]


def test_the_derivative_is_that_of_the_loss(backend: str) -> None:
    # Ratios away from the clip's edges, where the loss has no derivative.
    difference = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.4, -0.4], dtype=torch.float64)
    old, advantages = torch.randn(2, 7, dtype=torch.float64)
    rows, count, step = torch.arange(7), torch.tensor(9), 1e-6

    def losses(shift: float) -> tuple[Tensor, ...]:
        return policy_token_losses((old + difference + shift, old, advantages), rows, count)

    slope = (losses(step)[0] - losses(-step)[0]) / (2 * step)
    assert largest_difference(losses(0.0)[1], slope) < 1e-8


def test_repeats_bit_for_bit(backend: str) -> None:
    tokens = random_tokens(500)
    runs = [losses_and_metrics(tokens, torch.tensor(350)) for _ in range(2)]
    for a, b in zip((*runs[0][:2], *runs[0][2]), (*runs[1][:2], *runs[1][2]), strict=True):
        assert torch.equal(a, b)


def test_metrics_compile_without_a_graph_break(interpreter: None) -> None:
    *tokens, mask = random_tokens()
    terms = policy_token_losses(tuple(tokens), torch.arange(len(mask)), mask.sum())[2]
    compiled = torch.compile(policy_metrics, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        compiled(terms, mask, mask.sum()), policy_metrics(terms, mask, mask.sum()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 1023, 131072, 3_000_001])
def test_on_a_gpu(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    new, old, advantages, mask = (x.cuda() for x in random_tokens(num_tokens))
    mask[0] = True
    rows, count = torch.arange(num_tokens, device="cuda"), mask.sum()

    def run() -> tuple[Tensor, ...]:
        losses, derivatives, terms = policy_token_losses((new, old, advantages), rows, count)
        return losses, derivatives, *policy_metrics(terms, mask, count)

    run()
    torch.cuda.set_sync_debug_mode("error")
    runs = [run() for _ in range(20)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    tokens = tuple(x.cpu() for x in (new, old, advantages, mask))
    exact = exact_policy(tokens, int(count), 0.2, None)
    gradient = exact.pop("gradient")
    metrics = PolicyMetrics(*runs[0][2:])
    for name, want in exact.items():
        assert getattr(metrics, name).item() == pytest.approx(want.item(), abs=1e-6, rel=1e-5)
    assert largest_difference(runs[0][1].cpu().masked_fill(~tokens[3], 0), gradient) < 1e-6
