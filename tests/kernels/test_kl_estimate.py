"""The KL estimates from log-probs."""

import math

import pytest
import torch

from kernels.kl_estimate import kl_estimate


def test_kl_estimates_by_hand() -> None:
    logprob, ref_logprob = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    # log-ratios 0.5 and -1
    assert kl_estimate(logprob, ref_logprob, "k1").tolist() == [0.5, -1.0]
    assert kl_estimate(logprob, ref_logprob, "k2").tolist() == [0.125, 0.5]
    k3 = torch.tensor([math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1])
    assert torch.allclose(kl_estimate(logprob, ref_logprob, "k3"), k3)


def test_kl_gradients_have_the_right_sign() -> None:
    logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref_logprob = torch.tensor([-1.5, -1.0])
    expected = {
        "k1": torch.tensor([1.0, 1.0]),
        "k2": torch.tensor([0.5, -1.0]),
        "k3": 1 - torch.tensor([-0.5, 1.0]).exp(),
    }
    for kind, want in expected.items():
        (gradient,) = torch.autograd.grad(kl_estimate(logprob, ref_logprob, kind).sum(), logprob)
        assert torch.allclose(gradient, want), kind


def test_k3_is_never_negative_however_close_the_policies_are() -> None:
    ref_logprob = -torch.rand(1000) * 10
    logprob = ref_logprob + torch.logspace(-8, 1, 1000) * torch.randn(1000).sign()
    assert kl_estimate(logprob, ref_logprob, "k3").min() >= 0


def test_estimates_average_to_the_exact_kl() -> None:
    p, q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    # The mean under the policy, written as the sum over all samples.
    for kind in ("k1", "k3"):
        assert torch.allclose((p.exp() * kl_estimate(p, q, kind)).sum(), exact)


def test_an_unknown_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
