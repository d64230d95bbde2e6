"""Whatever the units, the ranks, the multiples and the budget: every unit is learned from once."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import Cut, EpochOrder, PackedBatch, micro_batches
from engine.data.examples import Example
from engine.feed import Feed, StepBatch
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.fuzzing import proved

LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([1, 2, 63, 64, 65, 300]))
UNITS = st.lists(st.lists(LENGTHS, min_size=1, max_size=4), min_size=1, max_size=14)
CUTS = st.builds(
    Cut,
    dp=st.integers(1, 5),
    multiple_of=st.sampled_from([1, 2, 3, 4, 8, 16]),
    count_multiple=st.integers(1, 4),
    is_even=st.booleans(),
)
LAYOUTS = st.sampled_from(
    [
        (1, ParallelLayout()),
        (4, ParallelLayout()),
        (4, ParallelLayout(tp=2, sequence_parallel=True)),
        (6, ParallelLayout(pp=2)),
        (8, ParallelLayout(pp=4, virtual_pp=2)),
        (4, ParallelLayout(cp=2)),
    ]
)


def units_of(lengths: list[list[int]]) -> list[list[Example]]:
    """Units whose every token, and every value that goes with one, is theirs alone."""
    units, first = [], 1
    for number, unit in enumerate(lengths):
        sequences = []
        for length in unit:
            tokens = np.arange(first, first + length, dtype=np.int64)
            fields = {"old": tokens * 0.5, "score": float(number)}
            prompt_length = 1 + first % length
            sequences.append(Example(tokens=tokens, prompt_length=prompt_length, fields=fields))
            first += length
        units.append(sequences)
    return units


def unpacked(batch: PackedBatch) -> list[tuple[Any, ...]]:
    """Return the units of a micro-batch, each its sequences with all that is known of them; what is
    in no unit may teach nothing."""
    cu = batch.cu_seqlens.tolist()
    num_tokens = len(batch.tokens)
    assert cu[0] == 0 and cu[-1] == num_tokens
    lengths = np.diff(cu)
    assert (lengths > 0).all()
    assert batch.max_seqlen == max(lengths)
    assert batch.positions.tolist() == [n for length in lengths for n in range(length)]
    assert batch.targets.tolist() == torch.nonzero(batch.mask).flatten().tolist()
    sequences = []
    for number, (start, end) in enumerate(zip(cu, cu[1:], strict=False)):
        assert len(batch.fields["old"]) == num_tokens
        sequences.append(
            (
                int(batch.sequence_ids[number]),
                batch.tokens[start:end].tolist(),
                batch.mask[start:end].tolist(),
                batch.fields["old"][start:end].tolist(),
                float(batch.fields["score"][number]),
            )
        )
    bounds = batch.cu_units.tolist()
    assert bounds[0] == 0 and bounds[-1] == batch.num_sequences
    padding = sequences[batch.num_sequences :]
    assert len(padding) <= 1
    for sequence_id, tokens, mask, old, score in padding:
        assert (sequence_id, score) == (-1, 0.0)
        assert not any(tokens) and not any(mask) and not any(old)
    return [tuple(sequences[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def expected(units: list[list[Example]]) -> list[tuple[Any, ...]]:
    """Return what all ranks together have to hold of these units."""
    found, number = [], 0
    for unit in units:
        sequences = []
        for each in unit:
            mask = [position >= each.prompt_length for position in range(len(each.tokens))]
            old, score = each.fields["old"], each.fields["score"]
            sequences.append((number, each.tokens.tolist(), mask, old.tolist(), score))  # type: ignore[union-attr]
            number += 1
        found.append(tuple(sequences))
    return found


@proved
@given(lengths=UNITS, cut=CUTS, budget=st.integers(1, 400))
def test_units_come_once_within_the_budget_and_ranks_keep_step(
    lengths: list[list[int]], cut: Cut, budget: int
):
    units = units_of(lengths)
    ranks = [
        micro_batches(units, dataclasses.replace(cut, dp_rank=rank), budget)
        for rank in range(cut.dp)
    ]
    (count,) = {len(batches) for batches in ranks}
    assert count % cut.count_multiple == 0
    batches = [batch for batches in ranks for batch in batches]
    held = [unpacked(batch) for batch in batches]
    assert sorted(unit for part in held for unit in part) == expected(units)
    for batch, part in zip(batches, held, strict=True):
        assert len(batch.tokens) % cut.multiple_of == 0
        assert len(batch.tokens) <= max(budget, cut.multiple_of) or len(part) == 1
    # No more rounds than a rank needs whose micro-batches are half full, each with one above.
    room = max(budget // cut.multiple_of, 1) * cut.multiple_of
    total, longest = sum(map(sum, lengths)), max(map(sum, lengths))
    num_long = sum(sum(unit) > room / 2 for unit in lengths)
    most = num_long + 2 * (total / cut.dp + longest) / room + 1
    assert count <= math.ceil(most / cut.count_multiple) * cut.count_multiple


def rankings_of(lengths: list[list[int]]) -> list[list[Example]]:
    """Units whose sequences have one prompt, as long as the first length says, and rests of the
    others; every token but those of the prompt is theirs alone."""
    units, first = [], 1
    for number, (prompt_length, *rests) in enumerate(lengths):
        prompt = np.arange(first, first + prompt_length, dtype=np.int64)
        first += prompt_length
        sequences = []
        for rest in rests or [1]:
            tokens = np.concatenate([prompt, np.arange(first, first + rest, dtype=np.int64)])
            fields = {"old": tokens * 0.5, "score": float(number)}
            sequences.append(Example(tokens=tokens, prompt_length=prompt_length, fields=fields))
            first += rest
        units.append(sequences)
    return units


def completed(batch: PackedBatch) -> PackedBatch:
    """Return a batch whose sequences share prompts as one in which each is whole."""
    if batch.prefixes is None:
        return batch
    index = batch.prefixes.keys(batch.cu_seqlens).index
    starts, lengths = batch.prefixes.starts.tolist(), batch.prefixes.lengths.tolist()
    assert len(index) == batch.prefixes.num_keys
    for start, length in zip(starts, lengths, strict=True):
        assert not length or start in batch.cu_seqlens.tolist()
    mask = batch.mask[index]
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[index],
        positions=batch.positions[index],
        cu_seqlens=batch.prefixes.keys(batch.cu_seqlens).bounds,
        mask=mask,
        targets=mask.nonzero().flatten(),
        fields=batch.fields | {"old": batch.fields["old"][index]},
        prefixes=None,
    )


@proved
@given(lengths=UNITS, cut=CUTS, budget=st.integers(1, 400))
def test_units_that_share_prompts_are_whole_where_the_prompts_are_put_back(
    lengths: list[list[int]], cut: Cut, budget: int
):
    units = rankings_of(lengths)
    batches = [
        batch
        for rank in range(cut.dp)
        for batch in micro_batches(
            units, dataclasses.replace(cut, dp_rank=rank), budget, share_prompts=True
        )
    ]
    held = [unpacked(completed(batch)) for batch in batches]
    assert sorted(unit for part in held for unit in part) == expected(units)
    for batch, part in zip(batches, held, strict=True):
        assert len(batch.tokens) % cut.multiple_of == 0
        assert len(batch.tokens) <= max(budget, cut.multiple_of) or len(part) == 1
    own = sum(len(batch.tokens) for batch in batches)
    padding = sum(int(batch.cu_seqlens.diff()[batch.sequence_ids < 0].sum()) for batch in batches)
    assert own - padding == sum(
        unit[0].prompt_length + sum(len(each.tokens) - each.prompt_length for each in unit)
        for unit in units
    )


def steps_of(feed: Feed, dp: int) -> list[list[StepBatch]]:
    """Return each rank's part of three epochs, by step."""
    ranks = [
        dataclasses.replace(feed, parallel=dataclasses.replace(feed.parallel, dp=dp, dp_rank=rank))
        for rank in range(dp)
    ]
    return [[each.step(n) for each in ranks] for n in range(feed.order.num_steps(3))]


@proved
@given(
    lengths=UNITS,
    layout=LAYOUTS,
    batch_size=st.integers(1, 9),
    budget=st.integers(1, 200),
    seed=st.integers(0, 5),
)
def test_a_step_learns_from_the_same_units_in_every_layout_and_epochs_from_all(
    lengths: list[list[int]],
    layout: tuple[int, ParallelLayout],
    batch_size: int,
    budget: int,
    seed: int,
):
    units = units_of(lengths)
    alone: Parallel = start_parallel(ParallelLayout(), seed=1)
    feed = Feed(
        units=units,
        batch_size=batch_size,
        micro_batch_tokens=10_000,
        seed=seed,
        parallel=alone,
    )
    world_size, degrees = layout
    other = dataclasses.replace(
        feed,
        micro_batch_tokens=budget,
        parallel=dataclasses.replace(alone, layout=degrees),
    )
    learned: list[int] = []
    pairs = zip(steps_of(feed, 1), steps_of(other, degrees.dp(world_size)), strict=True)
    for number, ((plain,), parts) in enumerate(pairs):
        chosen = feed.order.indices(number)
        whole = sorted(unit for batch in plain.batches for unit in unpacked(batch))
        assert whole == expected([units[index] for index in chosen])
        held = [unpacked(batch) for part in parts for batch in part.batches]
        assert sorted(unit for part in held for unit in part) == whole
        assert len({len(part.batches) for part in parts}) == 1
        num_targets = sum(int(batch.mask.sum()) for part in parts for batch in part.batches)
        assert {part.num_targets for part in (plain, *parts)} == {num_targets}
        assert {part.num_tokens for part in (plain, *parts)} == {
            sum(map(sum, (lengths[i] for i in chosen)))
        }
        learned += chosen
    for epoch in range(3):
        one = learned[epoch * len(units) : (epoch + 1) * len(units)]
        assert sorted(one) == list(range(len(units)))


@proved
@given(
    num_examples=st.integers(1, 400),
    batch_size=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    epochs=st.one_of(st.integers(1, 4), st.floats(0.01, 4.0)),
)
def test_order_covers_all_in_as_few_steps_as_it_says(
    num_examples: int, batch_size: int, seed: int, epochs: float
):
    order = EpochOrder(num_examples, batch_size, seed)
    num_steps = order.num_steps(epochs)
    steps = [order.indices(step) for step in range(num_steps)]
    assert [order.indices(step) for step in reversed(range(num_steps))] == steps[::-1]
    assert all(len(step) == batch_size for step in steps)
    drawn = [index for step in steps for index in step]
    seen = [drawn[n : n + num_examples] for n in range(0, len(drawn), num_examples)]
    assert all(len(set(epoch)) == len(epoch) for epoch in seen)  # none twice before all came once
    whole = [tuple(epoch) for epoch in seen if len(epoch) == num_examples]
    assert num_examples < 12 or len(set(whole)) == len(whole)  # each epoch in an order of its own
    assert set(drawn) <= set(range(num_examples))
    assert num_steps >= 1 and len(drawn) >= epochs * num_examples * (1 - 1e-12)
    assert order.epoch(num_steps - 1) < epochs <= order.epoch(num_steps) * (1 + 1e-12)
