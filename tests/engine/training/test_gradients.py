import math

import pytest
import torch

from engine.training.gradients import scale_gradients, sum_of_squares

NAN, INF = math.nan, math.inf


def sum_of(gradients: list[list[float]], is_counted: list[int]) -> torch.Tensor:
    flags = torch.tensor(is_counted, dtype=torch.float32)
    return sum_of_squares([torch.tensor(values) for values in gradients], flags)


def test_squares_of_what_counts_are_added_up():
    gradients = [[3.0, 4.0], [-12.0], [1.0, 1.0, 2.0]]
    assert sum_of(gradients, [1, 1, 1]).tolist() == pytest.approx([25 + 144 + 6])
    assert sum_of(gradients, [1, 0, 1]).tolist() == pytest.approx([25 + 6])
    assert sum_of(gradients, [0, 0, 0]).tolist() == [0.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("is_counted", [0, 1])
def test_one_number_that_is_not_finite_is_seen_in_the_sum(bad: float, is_counted: int):
    total = sum_of([[3.0, 4.0], [0.0, bad]], [1, is_counted])
    assert total.shape == (1,)
    assert not total.isfinite()


def test_a_rank_without_gradients_adds_nothing():
    total = sum_of_squares([], torch.zeros(0))
    assert (total.tolist(), total.dtype) == ([0.0], torch.float32)


def test_gradients_are_scaled_where_they_lie():
    gradients = [torch.tensor([3.0, -4.0]), torch.tensor([0.5])]
    addresses = [gradient.data_ptr() for gradient in gradients]
    scale_gradients(gradients, 0.25)
    assert [gradient.tolist() for gradient in gradients] == [[0.75, -1.0], [0.125]]
    assert [gradient.data_ptr() for gradient in gradients] == addresses


def test_a_factor_of_one_launches_nothing():
    gradient = torch.tensor([3.0, -4.0])
    scale_gradients([gradient], 1.0)
    assert gradient._version == 0  # torch counts what is written in place
    scale_gradients([], 0.5)
