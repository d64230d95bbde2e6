"""Log-prob and gradient of a row in one program."""

import pytest
import torch

from kernels.row_gradient import row_gradient
from kernels.row_pass import row_pass
from kernels.row_state import RowSpec, empty_results, write_row_results
from tests.kernels.oracle import exact_logprobs, largest_difference, random_rows

SPEC = RowSpec(num_valid_vocab=130, temperature=0.7, with_entropy=False)
SLOPE = torch.tensor(-0.3)


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [5, 145], of which 15 columns are padding, and labels with an ignored one."""
    logits, labels = random_rows(5, 145)
    labels = labels.clamp(max=129)
    labels[2] = -100
    return logits, labels


@pytest.mark.parametrize("num_columns", [1, 17, 64, 65, 128, 257])
def test_matches_fp64(backend: str, num_columns: int) -> None:
    logits, labels = random_rows(4, num_columns)
    spec = RowSpec(num_valid_vocab=num_columns, with_entropy=False)
    got, out = torch.empty(4), torch.empty_like(logits)
    row_pass(logits, labels, SLOPE, got, spec, out=out)
    leaf = logits.double().requires_grad_()
    want, _ = exact_logprobs(leaf, labels)
    assert largest_difference(got, want) < 2e-6 * max(1.0, logits.abs().max().item())
    gradient = torch.autograd.grad(-0.3 * want.sum(), leaf)[0]
    assert largest_difference(out, gradient) < 3e-6


def test_gives_the_bits_of_the_two_kernels(backend: str) -> None:
    logits, labels = case()
    results = empty_results(5, logits, with_entropy=False)
    write_row_results(results, logits, labels, SPEC)
    want = row_gradient(logits, labels, results.state, (SLOPE.expand(5), None), SPEC)
    got, out = torch.empty(5), torch.empty_like(logits)
    row_pass(logits, labels, SLOPE, got, SPEC, out=out)
    assert got.equal(results.logprobs)
    assert out.equal(want)
    assert got[2] == 0 and out[2].eq(0).all(), "an ignored row"
    assert out[:, 130:].eq(0).all(), "padding columns"


def test_a_bf16_gradient_may_lie_over_its_fp32_logits(backend: str) -> None:
    logits, labels = case()
    logits = torch.nn.functional.pad(logits, (0, 1))  # 146 columns: an even number of bf16
    separate, apart, over = logits.bfloat16(), torch.empty(5), torch.empty(5)
    row_pass(logits, labels, SLOPE, apart, SPEC, out=separate)
    out = logits.view(torch.bfloat16)[:, :146]
    row_pass(logits, labels, SLOPE, over, SPEC, out=out)
    assert over.equal(apart)
    assert out.equal(separate)


def test_no_row(backend: str) -> None:
    logits = torch.empty(0, 9)
    row_pass(logits, torch.empty(0).long(), SLOPE, torch.empty(0), SPEC, out=logits)
