import dataclasses

import numpy as np
import pytest
import torch

from engine.data.examples import Example
from engine.data.pretraining import TokenSequences
from engine.feed import Feed, pack_for, step_batch
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout

LENGTHS = (5, 9, 3, 14, 8, 2, 11)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def examples() -> list[Example]:
    """Example i is all tokens i; its first two are the prompt."""
    return [Example(tokens=np.full(n, i), prompt_length=2) for i, n in enumerate(LENGTHS)]


def feed_of(parallel: Parallel, **changes: object) -> Feed:
    feed = Feed(units=examples(), batch_size=3, micro_batch_tokens=12, seed=0, parallel=parallel)
    return dataclasses.replace(feed, **changes)


def test_steps_of_an_epoch_hold_every_example_once(parallel: Parallel):
    feed = feed_of(parallel, batch_size=7)
    seen = [int(b.tokens[start]) for b in feed.step(0).batches for start in b.cu_seqlens[:-1]]
    assert sorted(seen) == list(range(7))
    assert feed.step(0).batches[0].tokens.tolist() == feed.step(0).batches[0].tokens.tolist()
    assert feed.order.indices(1) != feed.order.indices(0)


def test_micro_batches_keep_to_the_budget(parallel: Parallel):
    batches = feed_of(parallel, batch_size=7).step(0).batches
    lengths = [len(batch.tokens) for batch in batches]
    assert sum(lengths) == sum(LENGTHS)
    assert [n for n in lengths if n > 12] == [14]  # what is longer is alone


def test_counts_are_of_the_global_batch_whatever_the_rank(parallel: Parallel):
    for dp, dp_rank in ((1, 0), (2, 0), (2, 1)):
        rank = dataclasses.replace(parallel, dp=dp, dp_rank=dp_rank)
        feed = feed_of(rank)
        chosen = feed.order.indices(4)
        assert feed.step(4).num_tokens == sum(LENGTHS[i] for i in chosen)
        assert feed.step(4).num_targets == sum(LENGTHS[i] - 2 for i in chosen)


def test_targets_of_all_ranks_add_up_to_the_count(parallel: Parallel):
    num_targets = 0
    for dp_rank in range(3):
        rank = dataclasses.replace(parallel, dp=3, dp_rank=dp_rank)
        num_targets += sum(int(b.mask.sum()) for b in feed_of(rank).step(2).batches)
    assert num_targets == feed_of(parallel).step(2).num_targets


def test_spread_is_of_the_rank_that_was_dealt_most(parallel: Parallel):
    # Of 5, 9, 3, 14, 8, 2, 11 the longest goes to the rank with the fewest tokens: 14 + 8 + 5 and
    # 11 + 9 + 3 + 2, 26 on average.
    two = dataclasses.replace(parallel, dp=2)
    assert step_batch(examples(), two, 100).spread == pytest.approx(27 / 26)
    assert step_batch(examples()[1:4:2], two, 100).spread == pytest.approx(14 / 11.5)
    assert step_batch(examples()[:2], parallel, 100).spread == 1.0
    assert feed_of(two, batch_size=7).step(3).spread == pytest.approx(27 / 26)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(pp=2, virtual_pp=2)])
def test_rank_reads_only_the_pretraining_text_that_it_keeps(
    layout: ParallelLayout, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
):
    text = TokenSequences(np.arange(7 * 40, dtype=np.uint16), 7)
    whole = [text[index] for index in range(40)]
    reads: list[int] = []
    read = TokenSequences.__getitem__
    monkeypatch.setattr(
        TokenSequences, "__getitem__", lambda self, i: (reads.append(i), read(self, i))[1]
    )
    kept = []
    for dp_rank in range(3):
        rank = dataclasses.replace(parallel, dp=3, dp_rank=dp_rank, layout=layout)
        feed = feed_of(rank, units=text, batch_size=16, micro_batch_tokens=14)
        plain = dataclasses.replace(feed, units=whole)
        reads.clear()
        found, of_plain = feed.step(5), plain.step(5)
        assert found.num_targets == of_plain.num_targets == 16 * 6
        assert (found.num_tokens, found.spread) == (of_plain.num_tokens, of_plain.spread)
        batches, expected = found.batches, of_plain.batches
        fillers = sum(batch.num_sequences == 0 for batch in batches)
        mine = sum(batch.num_sequences for batch in batches)
        assert mine <= len(reads) <= mine + (fillers > 0)
        kept += reads[:mine]
        assert len(batches) == len(expected)
        for batch, other in zip(batches, expected, strict=True):
            for name, value in vars(other).items():
                own = getattr(batch, name)
                same = torch.equal(own, value) if torch.is_tensor(value) else own == value
                assert same, name
    assert sorted(kept) == sorted(feed.order.indices(5))


def test_rows_of_a_pipeline_are_of_about_one_length(parallel: Parallel):
    lengths = (9, 8, 7, 6, 5, 5)
    units = [Example(tokens=np.full(n, i), prompt_length=2) for i, n in enumerate(lengths)]

    def rows(layout: ParallelLayout) -> list[int]:
        rank = dataclasses.replace(parallel, layout=layout)
        return [len(batch.tokens) for batch in pack_for(units, rank, 24)]

    assert rows(ParallelLayout()) == [24, 16]  # 9 + 8 + 7 and what is left
    assert rows(ParallelLayout(pp=2)) == [20, 20]
    # Four are asked for: 9, 8, 7 + 5, 6 + 5 and not two full ones beside two of nothing.
    assert rows(ParallelLayout(pp=4, virtual_pp=2)) == [9, 8, 12, 11]


def test_comparisons_count_all_their_sequences():
    pair = [Example(tokens=np.arange(n), prompt_length=2) for n in (4, 7)]
    rank = start_parallel(ParallelLayout(), seed=1)
    assert step_batch([pair], rank, 100).num_targets == 7
    assert step_batch([pair, pair], rank, 100).num_tokens == 22


def test_shared_prompts_are_counted_dealt_and_packed_once(parallel: Parallel):
    long = [Example(tokens=np.arange(20), prompt_length=19)] * 3
    short = [Example(tokens=np.arange(12), prompt_length=2)] * 2
    for batch in (
        step_batch([long, short], parallel, 22, share_prompts=True),
        feed_of(
            parallel, units=[long, short], batch_size=2, micro_batch_tokens=22, share_prompts=True
        ).step(0),
    ):
        assert batch.num_tokens == (19 + 3) + (2 + 20)
        assert batch.num_targets == 3 + 20
        assert [len(each.tokens) for each in batch.batches] == [22, 22]
    alone = step_batch([long, short], parallel, 22)
    assert alone.num_tokens == 60 + 24 and alone.num_targets == 3 + 20
    two = dataclasses.replace(parallel, dp=2)
    assert step_batch([long, short], two, 99, share_prompts=True).spread == 1.0


@pytest.mark.parametrize(
    ("layout", "multiple_of", "count_multiple"),
    [
        (ParallelLayout(tp=4), 1, 1),
        (ParallelLayout(tp=4, sequence_parallel=True), 4, 1),
        (ParallelLayout(pp=4), 1, 1),
        (ParallelLayout(pp=4, virtual_pp=2), 1, 4),
        (ParallelLayout(cp=3), 6, 1),
        (ParallelLayout(cp=2, tp=2, sequence_parallel=True), 8, 1),
    ],
)
def test_layout_asks_for_even_rows_and_counts(
    layout: ParallelLayout, multiple_of: int, count_multiple: int, parallel: Parallel
):
    rank = dataclasses.replace(parallel, layout=layout)
    batches = pack_for(examples(), rank, 12)
    assert all(len(batch.tokens) % multiple_of == 0 for batch in batches)
    assert len(batches) % count_multiple == 0
    plain = pack_for(examples(), parallel, 12)
    assert sum(int(b.mask.sum()) for b in batches) == sum(int(b.mask.sum()) for b in plain)
    if multiple_of == layout.pp == 1:
        assert [len(b.tokens) for b in batches] == [len(b.tokens) for b in plain]


def test_batches_go_to_the_device_whole(parallel: Parallel):
    (batch, *_) = pack_for(examples()[:2], parallel, 100)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if hasattr(value, "device")]
    assert len(tensors) >= 6
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_fewer_units_than_a_batch_are_taken_once_a_step(parallel: Parallel):
    units = examples()
    feed = Feed(units=units, batch_size=1000, micro_batch_tokens=12, seed=0, parallel=parallel)
    assert sorted(feed.order.indices(3)) == list(range(len(units)))
    assert feed.order.num_steps(2.0) == 2
    assert feed.step(0).num_tokens == sum(len(each.tokens) for each in units)
