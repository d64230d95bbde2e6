"""Log-probs and entropy from logits."""

import math

import pytest
import torch

from kernels.logprobs import logprobs
from tests.kernels.oracle import exact_logprobs, largest_difference, random_rows


def gradients(
    logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies, and the logits' gradient under upstream [2, T]."""
    leaf = logits.detach().requires_grad_()
    outputs = logprobs(leaf, labels, with_entropy=True, **options)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream))
    return *outputs, gradient


@pytest.mark.parametrize("num_columns", [1, 17, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_fp64_on_the_same_rounded_inputs(
    backend: str, num_columns: int, dtype: torch.dtype
) -> None:
    logits, labels = random_rows(4, num_columns, dtype=dtype)
    upstream = torch.randn(2, 4)
    logprob, entropy, gradient = gradients(logits, labels, upstream)
    leaf = logits.double().requires_grad_()
    exact = exact_logprobs(leaf, labels)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, list(upstream.double()))
    largest = max(1.0, logits.abs().max().item())
    assert largest_difference(logprob, exact[0]) < 2e-6 * largest
    assert largest_difference(entropy, exact[1]) < 5e-6 * max(1.0, math.log(num_columns))
    assert gradient.dtype == dtype
    # The interpreter truncates where a GPU rounds: one unit in the last place instead of a half.
    unit = torch.finfo(dtype).eps
    assert largest_difference(gradient, exact_gradient) < 3e-6 + unit * exact_gradient.abs().max()


@pytest.mark.parametrize("shift", [-1e4, -120.0, -104.0, 0.0, 1e4])
def test_shifting_all_logits_changes_nothing(backend: str, shift: float) -> None:
    logits, labels = random_rows(3, 200)
    shifted = logits + shift  # rounded: the exact answer is that of the shifted logits
    logprob, entropy, gradient = gradients(shifted, labels, torch.ones(2, 3))
    exact = exact_logprobs(shifted, labels)
    assert largest_difference(logprob, exact[0]) < 2e-6 * max(10.0, abs(shift))
    assert largest_difference(entropy, exact[1]) < 5e-6 * math.log(200)
    assert gradient.isfinite().all()


def test_the_order_of_the_vocabulary_does_not_matter(backend: str) -> None:
    logits, labels = random_rows(4, 150)
    order = torch.randperm(150)
    a = logprobs(logits, labels, with_entropy=True)
    b = logprobs(logits[:, order], order.argsort()[labels], with_entropy=True)
    assert largest_difference(a[0], b[0]) < 4e-6
    assert largest_difference(a[1], b[1]) < 4e-6


def test_temperature_divides_the_logits(backend: str) -> None:
    logits, labels = random_rows(4, 100)
    a, _ = logprobs(logits, labels, temperature=0.5)
    b, _ = logprobs(logits * 2, labels)
    assert a.equal(b)


def test_padding_columns_take_no_part(backend: str) -> None:
    logits, labels = random_rows(4, 100)
    labels = labels.clamp(max=89)
    logits[:, 90:95], logits[:, 95:] = 50.0, torch.nan
    upstream = torch.randn(2, 4)
    a = gradients(logits, labels, upstream, num_valid_vocab=90)
    b = gradients(logits[:, :90], labels, upstream)
    assert largest_difference(a[0], b[0]) < 1e-6
    assert largest_difference(a[1], b[1]) < 1e-6
    assert a[2][:, 90:].eq(0).all()
    assert largest_difference(a[2][:, :90], b[2]) < 1e-6


def test_a_padding_label_is_impossible(backend: str) -> None:
    logits, _ = random_rows(2, 100)
    logprob, _ = logprobs(logits, torch.tensor([90, 99]), num_valid_vocab=90)
    assert logprob.eq(-torch.inf).all()


@pytest.mark.parametrize("labels", [[-100] * 3, [5, -100, 6], []])
def test_ignored_rows_give_exact_zeros(backend: str, labels: list[int]) -> None:
    labels = torch.tensor(labels, dtype=torch.int64)
    logits, _ = random_rows(len(labels), 80)
    logits[labels == -100] = torch.nan  # they are not even read
    results = gradients(logits, labels, torch.ones(2, len(labels)))
    for result in results:
        assert result[labels == -100].eq(0).all()
        assert result[labels != -100].isfinite().all()


def test_a_nan_stays_in_its_row(backend: str) -> None:
    logits, labels = random_rows(3, 130)
    logits[1, 70] = torch.nan
    for result in gradients(logits, labels, torch.ones(2, 3)):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()


def test_extreme_logits(backend: str) -> None:
    logits = torch.zeros(5, 70)
    logits[0, 3] = 1e4  # one-hot
    logits[1, :] = -torch.inf  # all impossible but one
    logits[1, 5] = 2.0
    logits[2] = 65504.0
    logits[3] = -65504.0
    logits[4, ::2], logits[4, 1::2] = 65504.0, -65504.0
    labels = torch.tensor([3, 5, 0, 69, 0])
    logprob, entropy, gradient = gradients(logits, labels, torch.ones(2, 5))
    expected = [0.0, 0.0, -math.log(70), -math.log(70), -math.log(35)]
    assert torch.allclose(logprob, torch.tensor(expected), atol=1e-5)
    assert torch.allclose(entropy, -torch.tensor(expected), atol=1e-5)
    assert gradient.isfinite().all()
    assert logprobs(logits, torch.tensor([4, 4, 0, 0, 1]))[0].tolist()[:2] == [-1e4, -math.inf]


def test_log_probs_and_entropies_keep_their_bounds(backend: str) -> None:
    logits, labels = random_rows(8, 100, scale=20.0)
    logprob, entropy = logprobs(logits, labels, with_entropy=True)
    assert logprob.max() <= 1e-6
    assert entropy.min() >= -1e-6
    assert entropy.max() <= math.log(100) + 1e-6


def test_labels_may_be_int32_strided_or_misaligned(backend: str) -> None:
    logits, labels = random_rows(5, 90)
    want, _ = logprobs(logits, labels)
    strided = torch.zeros(10, dtype=torch.int64)
    strided[::2] = labels
    misaligned = torch.cat([torch.zeros(1, dtype=torch.int64), labels])[1:]
    for same in (labels.int(), strided[::2], misaligned):
        assert logprobs(logits, same)[0].equal(want)


def test_logits_may_be_transposed_sliced_or_expanded(backend: str) -> None:
    logits, labels = random_rows(5, 90)
    upstream = torch.randn(2, 5)
    want = gradients(logits, labels, upstream)
    wide = torch.full((5, 120), 9.0)
    wide[:, 7:97] = logits
    for same in (logits.t().contiguous().t(), wide[:, 7:97]):
        for got, expected in zip(gradients(same, labels, upstream), want, strict=True):
            assert largest_difference(got, expected) < 1e-6
    expanded = logits[:1].expand(5, 90)
    assert largest_difference(logprobs(expanded, labels)[0][:1], want[0][:1]) < 1e-6


def test_gradcheck(backend: str) -> None:
    logits, labels = random_rows(3, 17, dtype=torch.float64, scale=1.0)
    labels[1] = -100

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logprobs(x, labels, temperature=0.7, num_valid_vocab=15, with_entropy=True)

    labels[-1] = 14
    fast_mode = backend == "triton"  # random directions: the interpreter is slow
    assert torch.autograd.gradcheck(outputs, logits.requires_grad_(), fast_mode=fast_mode)


def test_an_entropy_that_is_only_logged_costs_no_gradient(backend: str) -> None:
    logits, labels = random_rows(3, 50)
    leaf = logits.requires_grad_()
    logprob, entropy = logprobs(leaf, labels, with_entropy=True)
    (with_logging,) = torch.autograd.grad(logprob.sum(), leaf)
    (alone,) = torch.autograd.grad(logprobs(leaf, labels)[0].sum(), leaf)
    assert with_logging.equal(alone)
    assert entropy.isfinite().all()


def test_repeated_runs_agree_bitwise(backend: str) -> None:
    logits, labels = random_rows(4, 150)
    upstream = torch.randn(2, 4)
    for first, second in zip(
        gradients(logits, labels, upstream), gradients(logits, labels, upstream), strict=True
    ):
        assert first.equal(second)


def test_offsets_past_31_bits(interpreter: None) -> None:
    # Row 2 begins 2^31 + 200 elements into the storage; its pages are never touched but there.
    stride = 2**30 + 100
    storage = torch.empty(2 * stride + 64, dtype=torch.float16)
    logits = storage.as_strided((3, 64), (stride, 1))
    values, labels = random_rows(3, 64, dtype=torch.float16)
    logits.copy_(values)
    assert logprobs(logits, labels)[0].equal(logprobs(values, labels)[0])


def test_compiles_without_a_graph_break() -> None:
    logits, labels = random_rows(4, 50)
    leaf = logits.requires_grad_()

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logprob, entropy = logprobs(x, y, temperature=0.7, with_entropy=True)
        return (logprob + entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf, labels), leaf)
    (want,) = torch.autograd.grad(loss(leaf, labels), leaf)
    assert got.equal(want)


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(4,\)"):
        logprobs(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))
