"""Moments merge to those of the whole, and whitening whitens."""

import pytest
import torch

from kernels.moments import masked_moments, merge_moments, whitening


def test_parts_merge_to_the_whole() -> None:
    x = torch.randn(1000) + 1e4  # a large mean costs a sum of squares its digits
    parts = x.split([1, 0, 400, 599])
    moments = torch.stack([masked_moments(part, torch.ones(len(part)) > 0) for part in parts])
    count, mean, squares = merge_moments(moments)
    exact = x.double()
    assert count == 1000
    assert mean == pytest.approx(exact.mean().item(), rel=1e-6)
    assert squares == pytest.approx(exact.var(unbiased=False).item() * 1000, rel=1e-4)


def test_only_what_the_mask_holds_counts() -> None:
    x = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan, torch.inf, torch.nan]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_moments(x, mask).tolist() == [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]


def test_whitening_gives_mean_0_and_variance_1() -> None:
    x = 3 * torch.randn(500) + 7
    mean, rstd = whitening(masked_moments(x, torch.ones(500) > 0))
    whitened = (x - mean) * rstd
    assert whitened.mean().abs() < 1e-5
    assert whitened.var() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_values_stay_as_they_are(count: int) -> None:
    x = torch.full((count,), 5.0)
    assert whitening(masked_moments(x, x > 0)) == (0, 1)
