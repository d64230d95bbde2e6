"""One number for the bits of a tensor: none of them can change alone without it."""

import pytest
import torch

from engine.training import digests as module
from engine.training.digests import digests

CPU = torch.device("cpu")


def digest(tensor: torch.Tensor) -> int:
    return int(digests([tensor], CPU)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_bit_of_every_element_counts(dtype: torch.dtype):
    tensor = torch.randn(7, dtype=torch.float64).to(dtype)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    num_bits = 8 * tensor.element_size()
    sound = digest(tensor)
    for element in range(len(tensor)):
        for bit in range(num_bits):
            flipped = tensor.clone()
            mask = 1 << bit if bit < num_bits - 1 else -(1 << bit)
            flipped.view(word)[element] ^= mask
            assert digest(flipped) != sound, (element, bit)


def test_it_is_the_weighted_sum_of_words():
    tensor = torch.tensor([1, -2, 5], dtype=torch.int32)
    assert digest(tensor) == 1 * 1 - 2 * 3 + 5 * 5
    assert digest(torch.tensor([2**62, 2**62], dtype=torch.int64)) == 0  # 2^64, 4 x 2^62


def test_bits_count_and_not_values():
    zeros, nan = torch.zeros(2), torch.tensor([float("nan"), 1.0])
    assert digest(zeros) != digest(-zeros)
    assert digest(nan) == digest(nan.clone())
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


def test_long_tensors_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(100, 3)
    whole = digest(tensor)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert digest(tensor) == whole
    assert digest(tensor.t().contiguous().t()) == whole  # whatever its strides


def test_no_tensors_have_no_digests():
    assert digests([], CPU).shape == (0,)
    assert digest(torch.zeros(0)) == 0
