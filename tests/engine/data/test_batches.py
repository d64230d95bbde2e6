import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import (
    Chosen,
    Cut,
    EpochOrder,
    deal,
    lengths_of,
    micro_batches,
    pack,
    shapes_of,
    split_by_tokens,
    spread,
)
from engine.data.examples import TRAINED, Example, begins_alike

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def make(length: int, first: int = 0, prompt_length: int = 1, **fields: object) -> Example:
    """A sequence whose tokens count up from `first`, so that no two of a test are alike."""
    tokens = np.arange(first, first + length, dtype=np.int64)
    return Example(tokens=tokens, prompt_length=prompt_length, fields=fields)


def make_all(lengths: list[int]) -> list[Example]:
    return [make(length, 1000 * (n + 1), 1 + n % length) for n, length in enumerate(lengths)]


# The order of examples


@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_example_comes_once_an_epoch(num_examples: int, batch_size: int, seed: int) -> None:
    order = EpochOrder(num_examples, batch_size, seed)
    steps = order.num_steps(3)
    drawn = [index for step in range(steps) for index in order.indices(step)]
    assert len(drawn) == steps * batch_size
    for epoch in range(3):
        one = drawn[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(one) == list(range(num_examples))
    assert order.epoch(steps) >= 3 > order.epoch(steps - 1)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    order = EpochOrder(100, 100, seed=1)
    assert order.indices(7) == EpochOrder(100, 100, seed=1).indices(7)  # no state: a resume
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != EpochOrder(100, 100, seed=2).indices(0)
    assert order.steps_per_epoch == 1
    assert EpochOrder(101, 100, seed=1).steps_per_epoch == 2


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="0 examples in batches of 4"):
        EpochOrder(0, 4, seed=0)


# Dealing and splitting


def test_a_batch_of_many_epochs_is_read_at_once():
    order = EpochOrder(7, 100_000, seed=1)
    found = order.indices(3)
    assert len(found) == 100_000
    one_by_one = EpochOrder(7, 1, seed=1)
    assert found[:20] == [one_by_one.indices(300_000 + n)[0] for n in range(20)]


@given(lengths=LENGTHS, dp=st.integers(1, 5))
def test_dealing_takes_each_once_and_balances_tokens(lengths: list[int], dp: int) -> None:
    dealt = deal(lengths, dp)
    assert sorted(index for part in dealt for index in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in dealt)
    loads = [sum(lengths[index] for index in part) for part in dealt]
    assert max(loads) - min(loads) <= max(lengths)


def test_dealing_counts_tokens_and_not_sequences() -> None:
    lengths = [10] + [1] * 10
    assert deal(lengths, 2) == [[0], list(range(1, 11))]


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_splitting_takes_each_once_and_keeps_the_budget(lengths: list[int], budget: int) -> None:
    groups = split_by_tokens(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= budget
    loads = [sum(lengths[index] for index in group) for group in groups]
    # No two groups would fit into one, so at most one is less than half full.
    assert len(loads) == 1 or sum(sorted(loads)[:2]) > budget


def test_splitting_fills_groups() -> None:
    assert split_by_tokens([6, 4, 5, 5, 10, 12], 10) == [[0, 1], [2, 3], [4], [5]]


# Packing


@given(lengths=LENGTHS, multiple_of=st.integers(1, 16))
def test_packing_lays_sequences_end_to_end(lengths: list[int], multiple_of: int) -> None:
    examples = make_all(lengths)
    batch = pack(examples, multiple_of=multiple_of)
    total = len(batch.tokens)
    assert total % multiple_of == 0
    assert 0 <= total - sum(lengths) < multiple_of
    assert batch.num_sequences == len(lengths)
    assert batch.max_seqlen == torch.diff(batch.cu_seqlens).max()
    for number, example in enumerate(examples):
        start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        assert batch.tokens[start:end].tolist() == example.tokens.tolist()
        assert batch.positions[start:end].tolist() == list(range(len(example.tokens)))
        predicted = batch.mask[start:end].nonzero().flatten().tolist()
        assert predicted == list(range(example.prompt_length, len(example.tokens)))

    padding = batch.tokens[sum(lengths) :]
    assert not padding.any()
    assert not batch.mask[sum(lengths) :].any()
    assert batch.cu_seqlens[-1] == total
    assert batch.positions[sum(lengths) :].tolist() == list(range(len(padding)))
    padding_ids = [-1] if len(padding) else []
    assert batch.sequence_ids.tolist() == [*range(len(lengths)), *padding_ids]


def test_dtypes_are_what_the_kernels_read() -> None:
    batch = pack([make(3, ranks=2, values=np.ones(3), good=np.ones(3, bool))], multiple_of=4)
    assert batch.tokens.dtype == batch.positions.dtype == batch.sequence_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.cu_units.dtype == torch.int32
    assert batch.mask.dtype == torch.bool
    assert batch.fields["ranks"].dtype == torch.int64
    assert batch.fields["values"].dtype == torch.float32
    assert batch.fields["good"].dtype == torch.bool


def test_fields_travel_with_their_sequence() -> None:
    one = make(2, values=np.array([0.5, 1.5]), scores=3.0)
    two = make(3, values=np.array([2.5, 3.5, 4.5]), scores=-1.0)
    batch = pack([one, two], multiple_of=4)
    assert batch.fields["values"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 0, 0, 0]
    assert batch.fields["scores"].tolist() == [3.0, -1.0, 0.0]


def test_a_field_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"field values has shape \(2,\), not \(3,\)"):
        pack([make(3, values=np.ones(2))], multiple_of=1)


def test_units_keep_their_sequences_together() -> None:
    units = [[make(2, ranks=1), make(3, ranks=2)], [make(1, ranks=1), make(1, ranks=3)]]
    batch = pack(units, multiple_of=8)
    assert batch.cu_units.tolist() == [0, 2, 4]
    assert batch.fields["ranks"].tolist() == [1, 2, 1, 3, 0]
    assert batch.num_sequences == 4


def ranking(prompt: list[int], *rests: list[int]) -> list[Example]:
    """Completions of a prompt, each with its number as its rank and a value a token."""
    return [
        Example(
            tokens=np.array(prompt + rest),
            prompt_length=len(prompt),
            fields={"ranks": rank, "values": np.array(prompt + rest) * 0.5},
        )
        for rank, rest in enumerate(rests)
    ]


def test_a_shared_prompt_is_laid_out_with_the_first_completion() -> None:
    units = [ranking([1, 2, 3], [4], [5, 6], [7]), ranking([8], [9, 10], [11]), ranking([1], [2])]
    batch = pack(units, multiple_of=4, share_prompts=True)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4, 3, 0, 1, 2, 1, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 7, 10, 11, 13, 16]
    assert batch.cu_units.tolist() == [0, 3, 5, 6]
    assert batch.fields["ranks"].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert batch.fields["values"].tolist() == [0.5 * token for token in batch.tokens.tolist()]
    assert (batch.max_seqlen, batch.num_sequences) == (5, 6)
    assert batch.prefixes is not None
    assert batch.prefixes.starts.tolist() == [0, 0, 0, 7, 7, 11, 0]
    assert batch.prefixes.lengths.tolist() == [0, 3, 3, 0, 1, 0, 0]
    assert batch.prefixes.num_keys == 16 + 3 + 3 + 1
    shapes = [[(len(each.tokens), each.prompt_length) for each in unit] for unit in units]
    assert lengths_of(shapes, share_prompts=True) == [7, 4, 2]
    assert lengths_of(shapes) == [4 + 5 + 4, 3 + 2, 2]


def test_units_of_one_sequence_share_nothing() -> None:
    batch = pack([make(3), make(2)], multiple_of=1, share_prompts=True)
    assert batch.prefixes is None
    assert pack([ranking([1], [2], [3])], multiple_of=1).prefixes is None


@pytest.mark.parametrize(
    "unit",
    [
        ranking([1, 2], [3]) + ranking([1, 4], [3]),
        ranking([1, 2], [3]) + ranking([1], [2, 3]),
        ranking([1, 2], [3]) + ranking([1, 2], []),
        ranking([1, 2], []) + ranking([1, 2], [3]),
    ],
)
def test_sequences_without_a_common_prompt_share_none(unit: list[Example]) -> None:
    with pytest.raises(ValueError, match="share no prompt"):
        pack([unit], multiple_of=1, share_prompts=True)
    assert not begins_alike(unit)


def test_moving_takes_the_prefixes_along() -> None:
    moved = pack([ranking([1], [2], [3])], multiple_of=1, share_prompts=True).to("meta")
    assert moved.prefixes is not None
    assert moved.prefixes.starts.is_meta and moved.prefixes.lengths.is_meta


def test_moving_keeps_every_tensor() -> None:
    batch = pack([make(3, scores=1.0)], multiple_of=4)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in [*tensors, moved.fields["scores"]])
    assert (moved.max_seqlen, moved.num_sequences) == (batch.max_seqlen, batch.num_sequences)


@pytest.mark.gpu
def test_moving_to_the_gpu_gives_the_same_numbers() -> None:
    batch = pack([make(3, scores=1.0)], multiple_of=4)
    moved = batch.to("cuda")
    torch.cuda.synchronize()
    assert moved.tokens.is_cuda
    assert torch.equal(moved.tokens.cpu(), batch.tokens)
    assert torch.equal(moved.fields["scores"].cpu(), batch.fields["scores"])


# Micro-batches


UNITS = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=12)


@given(
    unit_lengths=UNITS,
    dp=st.integers(1, 4),
    budget=st.integers(1, 100),
    multiple_of=st.integers(1, 8),
    count_multiple=st.integers(1, 3),
)
def test_the_ranks_share_one_global_batch(
    unit_lengths: list[list[int]], dp: int, budget: int, multiple_of: int, count_multiple: int
) -> None:
    sizes = np.cumsum([0] + [len(unit) for unit in unit_lengths])
    flat = make_all([length for unit in unit_lengths for length in unit])
    # One more unit in front: indices and sequence ids are not the same thing.
    examples = [[make(5)]] + [flat[a:b] for a, b in zip(sizes, sizes[1:], strict=False)]
    chosen = Chosen(examples, range(1, len(examples)))
    cut = Cut(dp=dp, multiple_of=multiple_of, count_multiple=count_multiple)
    ranks = [
        micro_batches(chosen, dataclasses.replace(cut, dp_rank=dp_rank), budget)
        for dp_rank in range(dp)
    ]
    counts = {len(batches) for batches in ranks}
    assert len(counts) == 1
    assert counts.pop() % count_multiple == 0

    seen = {}
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch.tokens) % multiple_of == 0
        is_one_unit = len(batch.cu_units) == 2
        assert len(batch.tokens) <= max(budget, multiple_of) or is_one_unit
        assert len(batch.cu_units) > 1 or not batch.mask.any()
        assert batch.cu_units[-1] == batch.num_sequences == (batch.sequence_ids >= 0).sum()
        for first, last in zip(batch.cu_units, batch.cu_units[1:], strict=False):
            ids = batch.sequence_ids[first:last].tolist()
            assert ids in [list(range(a, b)) for a, b in zip(sizes, sizes[1:], strict=False)]
        for number, sequence_id in enumerate(batch.sequence_ids.tolist()):
            start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
            if sequence_id >= 0:
                assert sequence_id not in seen
                seen[sequence_id] = batch.tokens[start:end].tolist()
    assert [seen[number] for number in range(len(flat))] == [e.tokens.tolist() for e in flat]


def test_a_rank_without_work_gets_masked_micro_batches() -> None:
    examples = [make(4, scores=1.0), make(8, scores=1.0)]
    batches = micro_batches(examples[1:], Cut(dp=2, dp_rank=1, multiple_of=4), 16)
    [filler] = batches
    assert len(filler.tokens) == 4
    assert not filler.mask.any()
    assert filler.sequence_ids.tolist() == [-1]
    assert filler.cu_units.tolist() == [0]
    assert filler.num_sequences == 0
    assert filler.fields["scores"].tolist() == [0.0]


def test_padding_does_not_lift_a_micro_batch_over_the_budget() -> None:
    examples = make_all([5, 5])
    batches = micro_batches(examples, Cut(multiple_of=8), 11)
    assert [len(batch.tokens) for batch in batches] == [8, 8]


def test_no_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        micro_batches([], Cut(), 8)
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([], multiple_of=1)


def test_five_thousand_examples_are_packed_without_much_waste() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 5_000).tolist()
    examples = make_all(lengths)
    batches = micro_batches(examples, Cut(multiple_of=8), 4096)
    assert len(batches) <= math.ceil(sum(lengths) / 4096 * 1.01)


def test_even_rows_stay_within_the_budget():
    # 6 + 4 and 5 + 3 + 2 fill two rows; longest first to the shorter row makes 6 + 3 + 2 of them.
    units = [Example(tokens=np.arange(n), prompt_length=1) for n in (6, 5, 4, 3, 2)]
    for is_even in (False, True):
        batches = micro_batches(units, Cut(is_even=is_even), 10)
        assert [len(batch.tokens) for batch in batches] == [10, 10]


def test_unit_over_the_budget_lends_its_room_to_no_others():
    lengths = [67, 63, 300, 67, 22, 67, 42, 86]
    batches = micro_batches(make_all(lengths), Cut(is_even=True), 216)
    assert all(len(batch.tokens) <= 216 or batch.num_sequences == 1 for batch in batches)


def test_spread_is_the_most_over_the_mean():
    assert spread([10, 30]) == 1.5
    assert spread([7]) == 1.0


def test_chosen_units_are_read_when_they_are_asked_for():
    reads = []

    class Noting(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    chosen = Chosen(Noting(make_all([3, 5, 8])), [2, 0])
    assert (len(chosen), reads) == (2, [])
    assert [len(chosen[n].tokens) for n in range(2)] == [8, 3]
    assert reads == [2, 0]
    assert [shape[0] for n in range(2) for shape in chosen.shapes(n)] == [8, 3]


def test_what_a_field_says_is_not_trained_is_masked_and_not_counted():
    def example(length: int, trained: list[int]) -> Example:
        mask = np.isin(np.arange(length), trained)
        return Example(tokens=np.arange(length), prompt_length=2, fields={TRAINED: mask})

    units = [example(5, [2, 4]), example(4, [3])]
    batch = pack(units, multiple_of=4)
    assert batch.targets.tolist() == [2, 4, 8]
    assert batch.mask.tolist() == [n in (2, 4, 8) for n in range(12)]
    assert [shapes_of(units, index) for index in (0, 1)] == [[(5, 3)], [(4, 3)]]
