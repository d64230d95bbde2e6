"""The four numbers of a row of one vocabulary shard."""

import math

import pytest
import torch

from kernels.row_state import RowSpec, row_state
from tests.kernels.oracle import largest_difference, random_rows


def test_a_shard_of_padding_has_an_empty_state(backend: str) -> None:
    logits, _ = random_rows(3, 10)
    labels = torch.tensor([1, 50, -100])
    state = row_state(logits, labels, RowSpec(num_valid_vocab=40, first_column=40))
    assert state[:, 0].eq(-torch.inf).all()
    assert state[:, 1:3].eq(0).all()
    # Column 1 is another shard's, column 50 is padding.
    assert state[:2, 3].tolist() == [0.0, -math.inf]


def test_both_sides_hold_the_same_four_numbers(interpreter: None) -> None:
    logits, labels = random_rows(5, 150)
    spec = RowSpec(num_valid_vocab=140, temperature=0.7)
    triton_state = row_state(logits, labels.clamp(max=139), spec)
    m, s, t, label_logit = triton_state.double().unbind(1)
    z = logits.double()[:, :140] / 0.7
    assert largest_difference(m, z.amax(1)) < 1e-6 * z.abs().max()
    e = (z - z.amax(1, keepdim=True)).exp()
    assert torch.allclose(s, e.sum(1), rtol=2e-6)
    assert torch.allclose(t, (e * e.log()).nan_to_num().sum(1), rtol=1e-5)
    assert largest_difference(label_logit, z.gather(1, labels.clamp(max=139)[:, None])[:, 0]) < 5e-6


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        RowSpec(num_valid_vocab=3, temperature=0)


@pytest.mark.parametrize(
    ("num_columns", "first_column", "valid"), [(10, 0, 10), (10, 20, 5), (10, 25, 0), (10, 40, 0)]
)
def test_num_valid_columns_of_a_shard(num_columns: int, first_column: int, valid: int) -> None:
    spec = RowSpec(num_valid_vocab=25, first_column=first_column)
    assert spec.num_valid_columns(num_columns) == valid
