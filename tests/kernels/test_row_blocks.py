"""Rows of logits by the block, as plain torch reads them."""

import pytest
import torch

from kernels import row_blocks as module
from kernels.row_blocks import row_blocks, scaled


@pytest.mark.parametrize("num_rows", [0, 1, 12, 13])
def test_blocks_hold_every_row_once_in_order(
    monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_WORDS", 4 * 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    matrix = torch.arange(num_rows * 10.0).view(num_rows, 10)
    blocks = [matrix[rows] for rows in row_blocks(matrix)]
    assert torch.cat([matrix[:0], *blocks]).equal(matrix)
    assert [len(block) for block in blocks[:-1]] == [4] * (max(num_rows - 1, 0) // 4)


def test_every_core_has_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_WORDS", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert next(row_blocks(torch.empty(99, 10))) == slice(0, 12)


def test_a_row_wider_than_a_block_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_WORDS", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(row_blocks(torch.empty(2, 10))) == [slice(0, 1), slice(1, 2)]


def test_logits_are_scaled_in_fp32_and_copied_only_for_that() -> None:
    logits = torch.randn(3, 5)
    assert scaled(logits, 1.0) is logits
    half = logits.bfloat16()
    assert scaled(half, 0.7).equal(half.float() / 0.7)
    assert scaled(logits.double(), 2.0).dtype == torch.float64
