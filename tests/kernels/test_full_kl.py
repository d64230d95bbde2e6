"""The exact KL over the vocabulary and its gradients."""

import math

import pytest
import torch

from kernels.full_kl import full_kl
from tests.kernels.oracle import largest_difference, random_rows


def exact_kl(
    logits: torch.Tensor, ref_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """fp64 KL from torch's log-softmax."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    log_q = (ref_logits.double() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def two_policies(num_columns: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits of a policy and of a reference somewhat like it."""
    logits, _ = random_rows(5, num_columns)
    return [logits.to(dtype), (logits + torch.randn(5, num_columns)).to(dtype)]


@pytest.mark.parametrize("num_columns", [1, 17, 64, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_fp64(backend: str, num_columns: int, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in two_policies(num_columns, dtype)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(5)
    kl, exact = full_kl(*leaves, temperature=0.7), exact_kl(*exact_leaves, temperature=0.7)
    assert largest_difference(kl, exact) < 5e-6 * max(1.0, math.log(num_columns))
    got = torch.autograd.grad(kl, leaves, upstream)
    want = torch.autograd.grad(exact, exact_leaves, upstream.double())
    for gradient, exact_gradient in zip(got, want, strict=True):
        tolerance = 5e-6 + torch.finfo(dtype).eps * exact_gradient.abs().max()
        assert largest_difference(gradient, exact_gradient) < tolerance


def test_is_zero_between_equals_and_never_negative(backend: str) -> None:
    logits, ref_logits = two_policies(150)
    assert full_kl(logits, logits).abs().max() < 1e-6
    assert full_kl(logits, logits + 100.0).abs().max() < 1e-4, "a shift is no difference"
    assert full_kl(logits, ref_logits).min() > 0


@pytest.mark.parametrize("shift", [-1e4, -120.0, 1e4])
def test_shifting_all_logits_changes_nothing(backend: str, shift: float) -> None:
    logits, ref_logits = two_policies(100)
    logits = logits + shift
    kl = full_kl(logits, ref_logits)
    assert largest_difference(kl, exact_kl(logits, ref_logits)) < 5e-6 * math.log(100)


def test_padding_columns_take_no_part(backend: str) -> None:
    leaves = [x.requires_grad_() for x in two_policies(120)]
    with torch.no_grad():
        for x in leaves:
            x[:, 100:] = torch.nan
    exact_leaves = [x.detach()[:, :100].double().requires_grad_() for x in leaves]
    kl, exact = full_kl(*leaves, num_valid_vocab=100), exact_kl(*exact_leaves)
    assert largest_difference(kl, exact) < 5e-6 * math.log(100)
    want = torch.autograd.grad(exact.sum(), exact_leaves)
    for got, whole in zip(torch.autograd.grad(kl.sum(), leaves), want, strict=True):
        assert largest_difference(got[:, :100], whole) < 5e-6
        assert got[:, 100:].eq(0).all()


def test_a_token_the_reference_forbids_costs_infinitely_much(backend: str) -> None:
    logits, ref_logits = torch.zeros(2, 70), torch.zeros(2, 70)
    ref_logits[0, 3] = -torch.inf
    logits[1, 3] = -torch.inf  # forbidden to the policy itself: no cost
    kl = full_kl(logits, ref_logits)
    assert kl[0] == torch.inf
    assert abs(kl[1].item() - (math.log(70) - math.log(69))) < 1e-5


def test_what_underflows_costs_nothing_whatever_the_reference_says(backend: str) -> None:
    logits, ref_logits = two_policies(200)
    logits[:, :64], ref_logits[:, :64] = -1e4, -torch.inf  # lanes that see nothing else
    exact = exact_kl(logits[:, 64:], ref_logits[:, 64:])
    assert largest_difference(full_kl(logits, ref_logits), exact) < 5e-6 * math.log(200)


def test_the_order_of_the_vocabulary_does_not_matter(backend: str) -> None:
    logits, ref_logits = two_policies(150)
    order = torch.randperm(150)
    permuted = full_kl(logits[:, order], ref_logits[:, order])
    assert largest_difference(permuted, full_kl(logits, ref_logits)) < 4e-6


def test_offsets_past_31_bits(interpreter: None) -> None:
    # Row 2 begins 2^31 + 200 elements into the storage; its pages are never touched but there.
    stride = 2**30 + 100
    storage = torch.empty(2 * stride + 64, dtype=torch.float16)
    far = storage.as_strided((3, 64), (stride, 1))
    logits, ref_logits = (x[:3] for x in two_policies(64, torch.float16))
    far.copy_(logits)
    assert torch.allclose(full_kl(far, ref_logits), full_kl(logits, ref_logits), rtol=1e-5)


def test_a_nan_stays_in_its_row(backend: str) -> None:
    logits, ref_logits = two_policies(100)
    logits[1, 70], ref_logits[2, 5] = torch.nan, torch.nan
    kl = full_kl(logits, ref_logits)
    assert kl[[1, 2]].isnan().all()
    assert kl[[0, 3, 4]].isfinite().all()


def test_gradcheck(backend: str) -> None:
    leaves = [x[:2].requires_grad_() for x in two_policies(17, torch.float64)]
    options = {"temperature": 0.7, "num_valid_vocab": 15}
    assert torch.autograd.gradcheck(
        lambda x, y: full_kl(x, y, **options), leaves, fast_mode=backend == "triton"
    )


def test_zero_rows(backend: str) -> None:
    leaves = [torch.zeros(0, 9, requires_grad=True) for _ in range(2)]
    kl = full_kl(*leaves)
    assert kl.shape == (0,)
    assert torch.autograd.grad(kl.sum(), leaves)[0].shape == (0, 9)


def test_strided_inputs_and_repeated_runs(backend: str) -> None:
    logits, ref_logits = two_policies(100)
    want = full_kl(logits, ref_logits)
    assert full_kl(logits, ref_logits).equal(want)
    transposed = ref_logits.t().contiguous().t()
    assert largest_difference(full_kl(logits, transposed), want) < 2e-6


def test_compiles_without_a_graph_break() -> None:
    leaves = [x.requires_grad_() for x in two_policies(50)]

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return full_kl(x, y).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert a.equal(b)


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(3, 6\)"):
        full_kl(torch.zeros(3, 5), torch.zeros(3, 6))
