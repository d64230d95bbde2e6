"""Turning queries and keys: values, gradients, and where they lie."""

import pytest
import torch
from torch import Tensor

from kernels import rotate as file
from kernels.rotate import rotate, rotate_reference
from tests.kernels.oracle import relative_difference

TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
on_every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
# Heads of keys, of queries for each, dimensions of a head, and how many of them turn.
SIZES = [(2, 1, 16, 16), (3, 2, 20, 10), (1, 7, 96, 96), (5, 3, 64, 16), (1, 1, 300, 6)]


def made(
    size: tuple[int, int, int, int],
    num_tokens: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """The product [T, kv_heads, heads / kv_heads + 2, dim] of which queries and keys are columns,
    a leaf; cosines and sines of yarn's kind, times a factor."""
    kv_heads, members, dim, turned = size
    qkv = torch.randn(num_tokens, kv_heads, members + 2, dim)
    angles = 10 * torch.randn(num_tokens, 1, turned // 2)
    tensors = [qkv, 1.1 * angles.cos(), 1.1 * angles.sin()]
    qkv, cosines, sines = (x.to(device, dtype) for x in tensors)
    return qkv.requires_grad_(), cosines, sines


def parts(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return qkv[:, :, :-2], qkv[:, :, -2]


def exact(qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 rotation by complex numbers."""
    turns = torch.complex(cosines.double(), sines.double())  # [T, 1, r / 2]
    half = turns.shape[-1]

    def turned(x: Tensor) -> Tensor:
        shaped = turns if x.dim() == 3 else turns[:, None]
        z = torch.complex(x[..., :half], x[..., half : 2 * half]) * shaped
        return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)

    query, key = parts(qkv)
    return turned(query), turned(key)


def errors_of(qkv: Tensor, cosines: Tensor, sines: Tensor) -> list[float]:
    """Of turned queries, keys and the gradient of both, beside those in fp64."""
    double = qkv.detach().double().requires_grad_()
    want = exact(double, cosines, sines)
    got = rotate(*parts(qkv), cosines, sines)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, qkv.dtype) for x in want]
    assert all(x.is_contiguous() for x in got)
    upstream = [torch.randn_like(x) for x in got]
    got += torch.autograd.grad(got, qkv, upstream)
    want += torch.autograd.grad(want, double, [x.double() for x in upstream])
    return [relative_difference(a, b) for a, b in zip(got, want, strict=True)]


@on_every_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [2048, 16])
def test_matches_complex_numbers(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int, int], block: int, monkeypatch
) -> None:
    monkeypatch.setattr(file, "_BLOCK", block)  # 16: a head or two a program
    assert max(errors_of(*made(size, dtype=dtype))) < TOLERANCES[dtype]


def test_groups_of_heads_turn_as_heads_do(backend: str) -> None:
    qkv, cosines, sines = made((3, 2, 20, 10))
    query, key = parts(qkv)
    grouped, _ = rotate(query, key, cosines, sines)
    flat, _ = rotate(query.flatten(1, 2), key, cosines, sines)
    assert torch.equal(grouped.flatten(1, 2), flat)


def test_values_of_the_heads_of_a_tensor_by_itself_are_the_same(interpreter: None) -> None:
    qkv, cosines, sines = made((2, 3, 16, 8), dtype=torch.float64)
    for found, x in zip(rotate(*parts(qkv), cosines, sines), parts(qkv), strict=True):
        torch.testing.assert_close(found, rotate_reference(x, cosines, sines))


def test_columns_that_are_strided(backend: str) -> None:
    _, cosines, sines = made((2, 1, 16, 8))
    wide = torch.randn(4, 2, 32)
    query, key = wide[..., ::2], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 8:24]
    got = rotate(query, key, cosines, sines)
    want = rotate(query.contiguous(), key.contiguous(), cosines, sines)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_tokens(backend: str) -> None:
    qkv, cosines, sines = made((2, 2, 16, 8), num_tokens=0)
    query, key = rotate(*parts(qkv), cosines, sines)
    (query.sum() + key.sum()).backward()
    assert (query.shape, key.shape) == ((0, 2, 2, 16), (0, 2, 16))
    assert qkv.grad.shape == (0, 2, 4, 16)


def test_keys_that_nobody_reads(backend: str) -> None:
    qkv, cosines, sines = made((2, 2, 16, 8))
    (gradient,) = torch.autograd.grad(rotate(*parts(qkv), cosines, sines)[0].sum(), qkv)
    assert (gradient[:, :, :-2] != 0).all()
    assert (gradient[:, :, -2:] == 0).all()


def test_gradcheck(backend: str) -> None:
    qkv, cosines, sines = made((1, 2, 6, 4), num_tokens=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(*parts(x), cosines, sines), qkv)


def test_backward_keeps_the_angles_alone(interpreter: None) -> None:
    qkv, cosines, sines = made((2, 2, 16, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        rotate(*parts(qkv), cosines, sines)
    assert [tensor.shape for tensor in kept] == [cosines.shape] * 2


def test_compiles_without_a_graph_break(interpreter: None) -> None:
    qkv, cosines, sines = made((2, 2, 16, 8))

    def loss(x: Tensor) -> Tensor:
        query, key = rotate(*parts(x), cosines, sines)
        return query.square().sum() + (2 * key).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, loss))
    assert torch.equal(got, want)


@pytest.mark.gpu
@on_every_dtype
@pytest.mark.parametrize("num_tokens", [1, 70001])
@pytest.mark.parametrize("size", [(8, 4, 128, 128), (12, 1, 64, 64), (3, 1, 80, 20)])
def test_on_a_gpu(size: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype) -> None:
    qkv, cosines, sines = made(size, num_tokens, dtype=dtype, device="cuda")
    qkv = qkv.detach().requires_grad_()
    assert max(errors_of(qkv, cosines, sines)) < TOLERANCES[dtype]
    torch.cuda.set_sync_debug_mode("error")
    runs = [rotate(*parts(qkv), cosines, sines) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_holds_it() -> None:
    qkv, cosines, sines = made((8, 4, 128, 128), 24, dtype=torch.bfloat16, device="cuda")
    qkv = qkv.detach()
    rotate(*parts(qkv), cosines, sines)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = rotate(*parts(qkv), cosines, sines)
    qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    fresh = rotate(*parts(qkv), cosines, sines)
    assert all(torch.equal(a, b) for a, b in zip(held, fresh, strict=True))
