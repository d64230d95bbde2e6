"""Estimates of the KL from samples: in kernels and in plain torch (Schulman, "Approximating KL
divergence").

With r = logprob - ref_logprob of a token that the policy chose:

    k1 = r               unbiased, signed
    k2 = r^2 / 2         biased; its gradient is unbiased for the KL's
    k3 = e^-r - 1 + r    unbiased, never negative
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]
"""Also the choices of engine/settings/kl.py, which cannot import this file: it is free of torch."""


@triton.jit
def exp_remainder(x):
    """e^x - 1 - x, never negative: the series where the difference would cancel."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1 - x)


@triton.jit
def token_kl(log_ratio, KIND: tl.constexpr):
    """The k1, k2 or k3 estimate from logprob - ref_logprob."""
    if KIND == "k1":
        kl = log_ratio
    elif KIND == "k2":
        kl = 0.5 * log_ratio * log_ratio
    else:
        tl.static_assert(KIND == "k3")
        kl = exp_remainder(-log_ratio)
    return kl


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, nats.

    logprobs, ref_logprobs and the result have one shape. Differentiable in both.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        # In fp64, because near r = 0 the sum cancels down to r^2 / 2, below the rounding of r.
        exact = log_ratio.double()
        return (torch.expm1(-exact) + exact).to(log_ratio.dtype)
    raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(KlEstimator))}")
