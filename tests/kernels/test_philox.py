"""The noise of sampling: its bits and its distribution."""

import math

import pytest
import torch
from torch import Tensor

from kernels import philox as philox_module
from kernels.philox import (
    MAX_COLUMNS,
    SampleKey,
    column_log_survival,
    group_log_survival,
    philox,
)


def test_philox_gives_the_published_numbers() -> None:
    # Random123's known answers for philox4x32-10: counter and key all zeros, then all ones.
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(x) for x in philox(SampleKey(0, zero, zero), zero[None])]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    key = SampleKey(2**64 - 1, torch.tensor([-1]), torch.tensor([ones]))
    words = [int(x) for x in philox(key, torch.tensor([[ones]]))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


KEY = SampleKey(5, torch.arange(64), torch.arange(64) % 7)


def gumbel(log_survival: Tensor) -> Tensor:
    return -log_survival.double().neg().log()


def of_columns(groups: range) -> Tensor:
    """[64, 8 G] noise of the columns of some groups."""
    numbers = torch.tensor(groups)
    noise = [gumbel(column_log_survival(KEY, group.expand(64, 1))) for group in numbers]
    return torch.cat(noise, dim=1)


def of_groups(groups: range) -> Tensor:
    """[64, G] noise of groups."""
    return gumbel(group_log_survival(KEY, groups.start, len(groups)))


@pytest.mark.parametrize("noise_of", [of_groups, of_columns])
def test_noise_is_standard_gumbel_and_uncorrelated(noise_of) -> None:  # noqa: ANN001
    noise = noise_of(range(8192) if noise_of is of_groups else range(1024))
    assert noise.shape == (64, 8192)
    assert noise.mean() == pytest.approx(0.577216, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)
    flat = noise - noise.mean()
    for lag in ((0, 1), (0, 4), (1, 0)):  # neighbouring columns, quads and samples
        product = flat[lag[0] :, lag[1] :] * flat[: len(flat) - lag[0], : 8192 - lag[1]]
        assert abs(product.mean()) < 0.02


def test_noise_of_a_group_says_nothing_of_any_column() -> None:
    groups, columns = of_groups(range(512)), of_columns(range(512))
    # Neither of the group's own columns, nor of the column that has the group's number.
    for pair in (columns.view(64, 512, 8), columns[:, :512, None]):
        product = (groups - groups.mean())[..., None] * (pair - columns.mean())
        assert product.mean((0, 1)).abs().max() < 0.05


def test_no_counter_serves_a_column_and_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(key: SampleKey, words: Tensor) -> tuple[Tensor, ...]:
        seen.append(words)
        return philox(key, words)

    monkeypatch.setattr(philox_module, "philox", record)
    last = MAX_COLUMNS // 8
    column_log_survival(KEY, torch.full((64, 1), last))
    group_log_survival(KEY, 0, 1)
    group_log_survival(KEY, last, 1)
    columns, first_group, last_group = seen
    assert columns.max() == MAX_COLUMNS // 4
    assert columns.max() < first_group.min() <= last_group.max() < 2**32


def test_noise_does_not_depend_on_where_a_part_begins() -> None:
    whole = group_log_survival(KEY, 0, 64)
    for first in (1, 2, 3, 4, 37):
        assert torch.equal(group_log_survival(KEY, first, 20), whole[:, first : first + 20])


def test_noise_reaches_what_rare_tokens_need() -> None:
    # The largest of 4 million draws lies near log(4e6) = 15.2; the largest there is, at 22.9.
    assert 13 < of_groups(range(1 << 16)).max() < 22.9
