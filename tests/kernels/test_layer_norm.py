"""Layer norm: outputs, gradients, fixed order of the weights' sums."""

import pytest
import torch
from torch import Tensor

from kernels import layer_norm as layer_norm_module
from kernels.layer_norm import layer_norm
from tests.kernels.oracle import largest_difference, relative_difference


def random_layer(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves x, weight and bias."""
    row = shape[-1:]
    tensors = [torch.randn(shape) + 0.5, 1 + 0.1 * torch.randn(row), torch.randn(row)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """fp64 layer norm of fp64 inputs."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def output_and_gradients(leaves: list[Tensor], upstream: Tensor, *, exact: bool) -> tuple:
    """The output and the gradients of all leaves."""
    y = exact_layer_norm(*leaves) if exact else layer_norm(*leaves, eps=1e-5)
    return y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 100), (1, 3), (9, 257), (2, 768)])
def test_matches_fp64(backend: str, shape: tuple[int, ...]) -> None:
    leaves = random_layer(shape)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(shape)
    got = output_and_gradients(leaves, upstream, exact=False)
    want = output_and_gradients(exact_leaves, upstream, exact=True)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert largest_difference(a, b) < 5e-6 * (1 + b.abs().max())


@pytest.fixture
def narrow_parts(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond 64 columns are wide ones: programs of 32 columns in the backward pass."""
    monkeypatch.setattr(layer_norm_module, "_WHOLE_ROW", 64)
    monkeypatch.setattr(layer_norm_module, "_PART", 32)


@pytest.mark.parametrize("width", [64, 65, 96, 100])
def test_rows_in_parts_match_fp64(narrow_parts: None, width: int) -> None:
    test_matches_fp64("triton", (9, width))


def test_a_nan_stays_in_its_row_of_several_parts(narrow_parts: None) -> None:
    test_a_nan_stays_in_its_row("triton", 100)


def test_no_rows_of_several_parts(narrow_parts: None) -> None:
    x, weight, bias = random_layer((0, 100))
    layer_norm(x, weight, bias, eps=1e-5).sum().backward()
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


def test_bf16_is_fp32_rounded_once(backend: str) -> None:
    leaves = random_layer((7, 200), dtype=torch.bfloat16)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(7, 200).bfloat16()
    got = output_and_gradients(leaves, upstream, exact=False)
    want = output_and_gradients(exact_leaves, upstream, exact=True)
    assert {x.dtype for x in got} == {torch.bfloat16}
    for a, b in zip(got, want, strict=True):
        assert relative_difference(a, b) < 4e-3


def test_fp32_weights_of_a_bf16_network(backend: str) -> None:
    x, weight, bias = random_layer((6, 64))
    x = x.detach().bfloat16().requires_grad_()
    y = layer_norm(x, weight, bias, eps=1e-5)
    y.sum().backward()
    assert [t.dtype for t in (y, x.grad)] == [torch.bfloat16] * 2
    assert [t.grad.dtype for t in (weight, bias)] == [torch.float32] * 2


def test_a_large_mean_costs_no_digits(backend: str) -> None:
    x, weight, bias = random_layer((4, 128))
    shifted = (x.detach() + 1000).requires_grad_()
    exact = exact_layer_norm(*(t.detach().double() for t in (shifted, weight, bias)))
    assert largest_difference(layer_norm(shifted, weight, bias, eps=1e-5), exact) < 1e-3


def test_a_nan_stays_in_its_row(backend: str, width: int = 40) -> None:
    x, weight, bias = random_layer((5, width))
    with torch.no_grad():
        x[2, 7] = torch.nan
    y = layer_norm(x, weight, bias, eps=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for result in (y, gradient):
        assert result.isnan().any(1).tolist() == [False, False, True, False, False]


def test_strided_rows_and_no_rows(backend: str) -> None:
    x, weight, bias = random_layer((6, 32))
    wide = torch.randn(6, 64, requires_grad=True)
    half = wide[:, ::2]
    assert torch.equal(
        layer_norm(half, weight, bias, eps=1e-5),
        layer_norm(half.contiguous(), weight, bias, eps=1e-5),
    )
    y = layer_norm(x[:0], weight, bias, eps=1e-5)
    y.sum().backward()
    assert y.shape == (0, 32)
    assert (weight.grad == 0).all()


def test_gradcheck(backend: str) -> None:
    leaves = [x.detach().double().requires_grad_() for x in random_layer((2, 3))]
    assert torch.autograd.gradcheck(lambda *x: layer_norm(*x, eps=1e-5), leaves)


def test_repeats_bit_for_bit(backend: str) -> None:
    leaves, upstream = random_layer((12, 64)), torch.randn(12, 64)
    runs = [output_and_gradients(leaves, upstream, exact=False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    leaves = random_layer((4, 32))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, eps=1e-5).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    want = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 2048), (70000, 768), (3, 12288), (5000, 12288), (1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves = [x.detach().cuda().requires_grad_() for x in random_layer(shape, dtype=dtype)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(shape, device="cuda").to(dtype)
    output_and_gradients(leaves, upstream, exact=False)
    torch.cuda.set_sync_debug_mode("error")
    runs = [output_and_gradients(leaves, upstream, exact=False) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    want = output_and_gradients(exact_leaves, upstream, exact=True)
    for run in runs:
        for a, b, c in zip(run, runs[0], want, strict=True):
            assert torch.equal(a, b)
            assert relative_difference(a, c) < (1e-5 if dtype == torch.float32 else 4e-3)
