import pytest
import torch

from kernels.rms_norm import rms_norm


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("shape", [(5, 1, 37), (3, 2, 4, 16), (1, 4096)])
def test_norm_and_gradients_are_those_of_fp64(device, dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator) + 0.5
    x, dy, weight = (t.to(device, dtype) for t in (3 * x, dy, weight))
    x.requires_grad_()
    weight.requires_grad_()
    exact = reference(x, weight, 1e-6)
    wanted = torch.autograd.grad(exact, (x, weight), dy.double())
    out = rms_norm(x, weight, eps=1e-6)
    found = torch.autograd.grad(out, (x, weight), dy)
    assert out.dtype == dtype
    for mine, theirs in zip((out, *found), (exact, *wanted), strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < tolerance


def test_backward_keeps_the_input_and_a_number_a_row():
    x = torch.randn(64, 1, 32, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        rms_norm(x, weight, eps=1e-5)
    assert sorted(tensor.numel() for tensor in kept) == [32, 64, 64 * 32]
