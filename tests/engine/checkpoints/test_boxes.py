import itertools
import math

import pytest
import torch

from engine.checkpoints.boxes import boxes


def test_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_beginning_of_one():
    assert boxes((5, 10), 7, 42) == [((0, 7), (1, 3)), ((1, 0), (3, 10)), ((4, 0), (1, 2))]
    assert boxes((5, 10), 10, 30) == [((1, 0), (2, 10))]
    assert boxes((5, 10), 12, 15) == [((1, 2), (1, 3))]
    assert boxes((5, 10), 17, 23) == [((1, 7), (1, 3)), ((2, 0), (1, 3))]
    assert boxes((5, 10), 20, 20) == []
    assert boxes((50,), 7, 42) == [((7,), (35,))]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2)])
def test_boxes_hold_every_range_in_its_order(shape: tuple[int, ...]):
    tensor = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(tensor.numel() + 1), 2):
        found = [
            tensor[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))].flatten()
            for offset, size in boxes(shape, start, stop)
        ]
        assert all(part.numel() for part in found)
        assert torch.cat(found).tolist() == list(range(start, stop))
