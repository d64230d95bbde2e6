"""The gradient of a row of logits."""

import pytest
import torch

from kernels.row_gradient import row_gradient
from kernels.row_merge import merge_row_states
from kernels.row_state import RowSpec, row_state
from tests.kernels.oracle import exact_logprobs, largest_difference, random_rows

SPEC = RowSpec(num_valid_vocab=130, temperature=0.7)


def exact_gradient(
    logits: torch.Tensor, labels: torch.Tensor, grads: tuple[torch.Tensor | None, ...]
) -> torch.Tensor:
    """fp64 gradient through torch's own log-softmax."""
    leaf = logits.double().requires_grad_()
    outputs = exact_logprobs(leaf, labels, temperature=0.7, num_valid_vocab=130)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    return torch.autograd.grad([p[0] for p in pairs], leaf, [p[1].double() for p in pairs])[0]


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_gradient_matches_fp64(backend: str, which: tuple[bool, bool]) -> None:
    logits, labels = random_rows(5, 145)
    labels = labels.clamp(max=129)
    labels[2] = -100
    grads = tuple(torch.randn(5) if wanted else None for wanted in which)
    got = row_gradient(logits, labels, row_state(logits, labels, SPEC), grads, SPEC)
    assert largest_difference(got, exact_gradient(logits, labels, grads)) < 3e-6
    assert got[2].eq(0).all(), "an ignored row"
    assert got[:, 130:].eq(0).all(), "padding columns"


@pytest.mark.parametrize("widths", [[145], [40, 105], [50, 50, 45], [70, 60, 15]])
def test_shards_give_the_columns_of_the_whole_gradient(backend: str, widths: list[int]) -> None:
    logits, labels = random_rows(4, 145)
    labels = labels.clamp(max=129)
    grads = torch.randn(4), torch.randn(4)
    shards, specs, first_column = logits.split(widths, dim=1), [], 0
    for shard in shards:
        specs.append(RowSpec(num_valid_vocab=130, first_column=first_column, temperature=0.7))
        first_column += shard.shape[1]
    states = [row_state(x, labels, spec) for x, spec in zip(shards, specs, strict=True)]
    merged = merge_row_states(torch.stack(states))
    parts = [
        row_gradient(x, labels, merged, grads, spec) for x, spec in zip(shards, specs, strict=True)
    ]
    assert largest_difference(torch.cat(parts, 1), exact_gradient(logits, labels, grads)) < 3e-6


def test_bf16_gradient_may_lie_over_its_fp32_logits(backend: str) -> None:
    logits, labels = random_rows(4, 200)
    labels = labels.clamp(max=129)
    grads = torch.randn(4), torch.randn(4)
    state = row_state(logits, labels, SPEC)
    separate = row_gradient(logits, labels, state, grads, SPEC, out=logits.bfloat16())
    over = logits.view(torch.bfloat16)[:, :200]
    row_gradient(logits, labels, state, grads, SPEC, out=over)
    assert over.equal(separate)


def test_gradients_of_a_row_sum_to_zero(backend: str) -> None:
    logits, labels = random_rows(6, 129)
    state = row_state(logits, labels, SPEC)
    for grads in ((torch.ones(6), None), (None, torch.ones(6))):
        sums = row_gradient(logits, labels, state, grads, SPEC).double().sum(1)
        assert sums.abs().max() < 3e-6


def test_entropy_has_no_slope_at_the_uniform_distribution(backend: str) -> None:
    logits, labels = torch.full((2, 70), 3.0), torch.tensor([0, 69])
    gradient = row_gradient(
        logits, labels, row_state(logits, labels, SPEC), (None, torch.ones(2)), SPEC
    )
    assert gradient.abs().max() < 1e-7


def test_expanded_upstream_gradients_are_read_right(backend: str) -> None:
    logits, labels = random_rows(3, 90)
    state = row_state(logits, labels, SPEC)
    expanded = torch.tensor(2.0).expand(3)
    assert row_gradient(logits, labels, state, (expanded, None), SPEC).equal(
        row_gradient(logits, labels, state, (torch.full((3,), 2.0), None), SPEC)
    )
