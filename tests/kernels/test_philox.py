"""The noise of sampling: its bits and its distribution."""

import math

import pytest
import torch

from kernels.philox import SampleKey, log_survival_reference, philox


def test_philox_gives_the_published_numbers() -> None:
    # Random123's known answers for philox4x32-10: counter and key all zeros, then all ones.
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(x) for x in philox(SampleKey(0, zero, zero), zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    key = SampleKey(2**64 - 1, torch.tensor([-1]), torch.tensor([ones]))
    words = [int(x) for x in philox(key, torch.tensor([ones]))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    key = SampleKey(5, torch.arange(64), torch.arange(64) % 7)
    noise = -log_survival_reference(key, 0, 8192).double().neg().log()
    assert noise.mean() == pytest.approx(0.577216, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)
    flat = noise - noise.mean()
    for lag in ((0, 1), (0, 4), (1, 0)):  # neighbouring columns, quads and samples
        product = flat[lag[0] :, lag[1] :] * flat[: len(flat) - lag[0], : 8192 - lag[1]]
        assert abs(product.mean()) < 0.02
