"""Where top-k and top-p cut a row."""

import pytest
import torch

from kernels.truncation import truncation_thresholds


def test_top_k_and_top_p_keep_whom_they_should() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    cut = {"temperature": 1.0}
    assert truncation_thresholds(logits, top_k=2, **cut) == logits[0, 1]
    assert truncation_thresholds(logits, top_p=0.39, **cut) == logits[0, 0]
    assert truncation_thresholds(logits, top_p=0.6, **cut) == logits[0, 1]
    assert truncation_thresholds(logits, top_k=3, top_p=0.5, **cut) == logits[0, 1]
    assert truncation_thresholds(logits, top_k=9, **cut) == logits[0, 3]


@pytest.mark.parametrize("top_k", [0, 1, 5, 30])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_the_columns_kept_are_the_fewest_of_enough_mass(top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 24)
    cut = truncation_thresholds(
        logits, temperature=0.7, top_k=top_k, top_p=top_p, num_valid_vocab=20
    )
    for row, least in zip(logits[:, :20].double() / 0.7, cut, strict=True):
        order = row.sort(descending=True).values[: top_k or None]
        mass = order.softmax(0).cumsum(0)
        num_kept = int((mass < top_p).sum()) + 1 if top_p < 1 else len(order)
        kept = (row >= least.double() - 1e-6).sum()
        assert kept == num_kept


def test_equals_of_the_last_one_kept_are_kept_as_well() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        least = truncation_thresholds(logits, temperature=1.0, **options)
        assert int((logits >= least).sum()) == 4


def test_padding_takes_no_part() -> None:
    logits = torch.tensor([[1.0, 0.0, 9.0]])
    assert truncation_thresholds(logits, temperature=1.0, top_k=1, num_valid_vocab=2) == 1.0


def test_the_threshold_is_of_the_scaled_logit() -> None:
    assert truncation_thresholds(torch.tensor([[3.0, 1.0]]), temperature=2.0, top_k=1) == 1.5
