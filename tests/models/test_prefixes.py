import pytest
import torch
from torch import Tensor

from models.prefixes import Prefixes, SequenceKeys, group_sees

# [p p p a a] [b] [c c] are a group with a prefix of 3; [d d] and [p e e] [f] follow.
CU_SEQLENS = torch.tensor([0, 5, 6, 8, 10, 13, 14], dtype=torch.int32)
PREFIXES = Prefixes(
    starts=torch.tensor([0, 0, 0, 8, 10, 10], dtype=torch.int32),
    lengths=torch.tensor([0, 3, 3, 0, 0, 1], dtype=torch.int32),
    num_keys=21,
)
INDEX = [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6, 7], [8, 9], [10, 11, 12], [10, 13]]


def keys() -> SequenceKeys:
    return PREFIXES.keys(CU_SEQLENS)


def test_a_sequence_has_the_keys_of_its_prefix_and_its_own():
    found = keys()
    assert found.is_of_row
    assert found.bounds.tolist() == [0, 5, 9, 14, 16, 19, 21]
    assert found.bounds.dtype is torch.int32
    assert found.index.tolist() == sum(INDEX, [])


@pytest.mark.parametrize(
    ("piece", "index"),
    [
        (range(4), [[0, 1, 2, 3], [], [], [], [], []]),
        (range(4, 7), [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6], [], [], []]),
        (range(7, 12), [[], [], [0, 1, 2, 6, 7], [8, 9], [10, 11], []]),
        (range(13, 14), [[], [], [], [], [], [10, 13]]),
    ],
)
def test_tokens_of_a_piece_have_the_keys_before_its_end(piece: range, index: list[list[int]]):
    found = keys().within(piece)
    assert not found.is_of_row
    assert found.index.tolist() == sum(index, [])
    assert found.counts.tolist() == [len(each) for each in index]


def test_what_is_padded_has_all_its_tokens_itself():
    padded = PREFIXES.padded(2, 7)
    found = padded.keys(torch.cat([CU_SEQLENS, CU_SEQLENS.new_tensor([19, 21])]))
    assert found.index.tolist() == [*sum(INDEX, []), *range(14, 21)]
    moved = PREFIXES.moved(lambda tensor: tensor + 1)
    assert moved.starts.tolist() == [1, 1, 1, 9, 11, 11] and moved.num_keys == PREFIXES.num_keys


def gradients_of(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [T_kv] of both, and what the gather makes of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(14, 2, 4, generator=generator).to(dtype) for _ in range(2)]
    inputs = [x.requires_grad_() for x in inputs]
    found = keys()
    gathered = found.gather(*inputs)
    for x, kept in zip(inputs, gathered, strict=True):
        assert torch.equal(kept, x[torch.tensor(sum(INDEX, []))])
    weights = [torch.randn(21, 2, 4, generator=generator).to(dtype) for _ in range(2)]
    return weights, list(torch.autograd.grad(gathered, inputs, weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_a_token_is_the_sum_of_its_keys(dtype: torch.dtype):
    weights, gradients = gradients_of(dtype)
    for weight, gradient in zip(weights, gradients, strict=True):
        exact = torch.zeros(14, 2, 4, dtype=torch.float64)
        exact.index_add_(0, torch.tensor(sum(INDEX, [])), weight.double())
        assert gradient.dtype is dtype
        # Of 16 bits only the sum is rounded.
        assert torch.equal(gradient, exact.to(dtype)) or dtype is torch.float32
        torch.testing.assert_close(gradient, exact.to(dtype), rtol=1e-6, atol=1e-6)


def test_groups_are_told_apart_and_made_once():
    found = keys()
    lengths, sees = found.groups(None)
    assert lengths == [8, 2, 4]
    assert sees[1] is None  # a sequence alone
    assert found.groups(None)[1] is sees
    assert found.groups(2)[1] is not sees


@pytest.mark.parametrize(
    ("prefix", "rests", "suits"),
    [
        (35, (30,) * 7, True),  # a place's descriptions
        (14, (13,) * 7, True),  # answers of a sentence
        (57, (76,) * 5, False),  # solutions step by step
        (180, (190,) * 3, False),  # replies of an assistant
        (200, (24,) * 20, True),
        (16, (24,) * 20, False),  # most pairs would be in vain
        (5, (3000,), True),  # a sequence alone is one call in either way
    ],
)
def test_a_group_is_one_call_where_calls_and_copies_cost_more(
    prefix: int, rests: tuple[int, ...], suits: bool
):
    own = [prefix + rests[0], *rests[1:], 9, 1, 1]
    lengths = [0, *[prefix] * (len(rests) - 1), 0, 3, 3]
    prefixes = Prefixes(
        starts=torch.zeros(len(own), dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        num_keys=sum(own) + sum(lengths),
    )
    found = prefixes.keys(torch.tensor([0, *own], dtype=torch.int32).cumsum(0).int())
    assert found.suits_groups is suits


def test_a_completion_sees_the_prefix_and_itself_and_no_other():
    device = torch.device("cpu")
    found = group_sees([5, 1, 2], [0, 3, 3], None, device)
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert found.int().tolist() == expected
    # A window counts positions, which go on from the prefix: of 2, a token and the one before it.
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert group_sees([5, 1, 2], [0, 3, 3], 2, device).int().tolist() == expected
    assert group_sees([5], [0], 5, device) is None
    assert group_sees([3], [0], 2, device).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
