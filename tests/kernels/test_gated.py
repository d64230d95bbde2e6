"""The gated activation: values, gradients, and what backward keeps."""

import pytest
import torch
from torch import Tensor

from kernels import gated as file
from kernels.gated import ACTIVATIONS, gated, gated_reference
from tests.kernels.oracle import largest_difference, relative_difference

TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
on_every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
on_every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def leaves_of(
    *shape: int, dtype: torch.dtype = torch.float32, with_bias: bool = True
) -> list[Tensor]:
    """Leaves x [..., 2F] and its bias."""
    tensors = [2 * torch.randn(shape), torch.randn(shape[-1:])][: 2 if with_bias else 1]
    return [x.to(dtype).requires_grad_() for x in tensors]


def output_and_gradients(function, leaves: list[Tensor], activation: str, upstream: Tensor):  # noqa: ANN001
    x, *bias = leaves
    y = function(x, activation, *bias)
    return y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def errors_of(leaves: list[Tensor], activation: str) -> list[float]:
    """Of output and gradients, beside those in fp64."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    x = leaves[0]
    upstream = torch.randn(*x.shape[:-1], x.shape[-1] // 2, device=x.device).to(x.dtype)
    got = output_and_gradients(gated, leaves, activation, upstream)
    want = output_and_gradients(gated_reference, exact, activation, upstream)
    assert {x.dtype for x in got} == {x.dtype}
    assert [x.shape for x in got] == [x.shape for x in want]
    return [relative_difference(a, b) for a, b in zip(got, want, strict=True)]


@on_every_activation
@on_every_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_fp64(
    backend: str, dtype: torch.dtype, activation: str, with_bias: bool, monkeypatch
) -> None:
    monkeypatch.setattr(file, "_BLOCK", 16)  # rows of several parts, the last one short
    for shape in ((5, 1, 74), (3, 2)):
        leaves = leaves_of(*shape, dtype=dtype, with_bias=with_bias)
        assert max(errors_of(leaves, activation)) < TOLERANCES[dtype]


def test_a_row_of_several_blocks(interpreter: None) -> None:
    assert max(errors_of(leaves_of(2, 2 * 2600), "silu")) < 1e-6


@on_every_activation
def test_gradcheck(backend: str, activation: str) -> None:
    leaves = leaves_of(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, bias: gated(x, activation, bias), leaves)


@on_every_activation
def test_extremes(backend: str, activation: str) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, torch.nan])
    x = torch.stack([gate, torch.full_like(gate, 3.0)], -1).flatten().requires_grad_()
    y = gated(x, activation)
    y.sum().backward()
    assert torch.equal(y[:-1], torch.tensor([0.0, 0.0, 0.0, 300.0, 3e4]))
    assert y[-1].isnan()
    slopes, values = x.grad.unflatten(0, (-1, 2)).unbind(-1)
    torch.testing.assert_close(values[:-1], y[:-1] / 3)
    torch.testing.assert_close(slopes[[0, 1, 3, 4]], torch.tensor([0.0, 0.0, 3.0, 3.0]))


def test_a_nan_stays_in_its_pair(backend: str) -> None:
    (x,) = leaves_of(4, 12, with_bias=False)
    with torch.no_grad():
        x[1, 4] = torch.nan
    y = gated(x, "silu")
    assert y.isnan().nonzero().tolist() == [[1, 2]]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isnan().nonzero().tolist() == [[1, 4], [1, 5]]


def test_strided_rows_and_no_rows(backend: str) -> None:
    wide, upstream = torch.randn(6, 40).requires_grad_(), torch.randn(5, 6).t()
    for x in (wide[:, 3:13], wide[::2, :10].repeat(2, 1), wide.t()[:10].t()):
        copy = x.contiguous().detach().requires_grad_()
        got, want = (torch.autograd.grad(gated(y, "silu"), y, upstream) for y in (x, copy))
        assert torch.equal(got[0], want[0])
    x, bias = leaves_of(0, 1, 8)
    y = gated(x, "silu", bias)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, 1, 4), (0, 1, 8))
    assert (bias.grad == 0).all()


def test_repeats_bit_for_bit(backend: str) -> None:
    leaves, upstream = leaves_of(12, 64), torch.randn(12, 32)
    runs = [output_and_gradients(gated, leaves, "gelu", upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backward_keeps_the_input_alone(interpreter: None) -> None:
    x, bias = leaves_of(16, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        gated(x, "silu", bias)
    assert sorted(tensor.numel() for tensor in kept) == [64, 16 * 64]


def test_the_bias_may_have_no_gradient(backend: str) -> None:
    x, bias = leaves_of(3, 8)
    (dx,) = torch.autograd.grad(gated(x, "silu", bias.detach()).sum(), x)
    (wanted,) = torch.autograd.grad(gated(x, "silu", bias).sum(), x)
    assert torch.equal(dx, wanted)


@pytest.mark.parametrize("with_bias", [False, True])
def test_compiles_without_a_graph_break(interpreter: None, with_bias: bool) -> None:
    leaves = leaves_of(4, 32, with_bias=with_bias)

    def loss(x: Tensor, *bias: Tensor) -> Tensor:
        return gated(x, "silu", *bias).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 22016), (70000, 3072), (3, 28672), (1, 74)])
@pytest.mark.parametrize("with_bias", [False, True])
@on_every_dtype
def test_on_a_gpu(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype) -> None:
    leaves = [
        x.detach().cuda().requires_grad_()
        for x in leaves_of(*shape, dtype=dtype, with_bias=with_bias)
    ]
    upstream = torch.randn(shape[0], shape[1] // 2, device="cuda")
    for activation in ACTIVATIONS:
        assert max(errors_of(leaves, activation)) < TOLERANCES[dtype]
        torch.cuda.set_sync_debug_mode("error")
        runs = [output_and_gradients(gated, leaves, activation, upstream) for _ in range(2)]
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_holds_it() -> None:
    x = torch.randn(24, 3072, device="cuda", dtype=torch.bfloat16)
    gated(x, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated(x, "silu")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert largest_difference(y, gated(x, "silu")) == 0
