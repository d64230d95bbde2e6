import pytest
import torch
import torch.nn.functional as F

from kernels import gelu as file
from kernels.gelu import gelu


def numbers(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1,), (7, 33), (4, 1, 1000)])
def test_value_and_gradient_match_fp64(shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(file, "_BLOCK", 100)  # several blocks, the last one short
    x, dy = numbers(*shape), numbers(*shape).flip(0)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = gelu(leaf), F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    gradient, wanted = (
        torch.autograd.grad(y, z, dy.to(y.dtype))[0] for y, z in ((got, leaf), (want, exact))
    )
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=1e-5)


def test_extremes() -> None:
    x = torch.tensor([-torch.inf, -1e4, -30.0, 0.0, 30.0, 1e4, torch.inf, torch.nan])
    torch.testing.assert_close(gelu(x)[1:-1], torch.tensor([0.0, 0, 0, 30, 1e4, torch.inf]))
    assert gelu(x)[-1].isnan()


def test_strided_empty_and_other_dtypes() -> None:
    x = numbers(6, 8)
    assert gelu(x.t()).equal(gelu(x).t())
    assert gelu(x[:0]).shape == (0, 8)
    for dtype in (torch.float64, torch.bfloat16):
        assert gelu(x.to(dtype)).equal(F.gelu(x.to(dtype), approximate="tanh"))


def test_the_input_stays_as_it_is() -> None:
    x = numbers(5)
    before = x.clone()
    gelu(x)
    assert x.equal(before)
