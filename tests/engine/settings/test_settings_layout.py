import dataclasses

import pytest

from engine.errors import UserError
from engine.settings.layout import ParallelLayout
from kernels.philox import GROUP
from models.sizes import VOCAB_GROUP, GPTSize

SIZE = GPTSize(num_layers=4, hidden_size=32, num_heads=4, vocab_size=100, context_length=64)


@pytest.mark.parametrize(
    ("layout", "world_size", "dp"),
    [(ParallelLayout(), 3, 3), (ParallelLayout(tp=2, pp=2), 8, 2), (ParallelLayout(pp=4), 4, 1)],
)
def test_data_parallelism_takes_what_the_model_leaves(
    layout: ParallelLayout, world_size: int, dp: int
):
    assert layout.dp(world_size) == dp


def test_world_that_the_model_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"6 ranks cannot be split.*tp 2 x pp 2 x cp 1 = 4"):
        ParallelLayout(tp=2, pp=2).dp(6)


@pytest.mark.parametrize(
    ("layout", "cause"),
    [
        (ParallelLayout(tp=3), "tp 3 must divide the model's 4 heads"),
        (ParallelLayout(pp=3), "pp 3 x --layout.virtual-pp 1 must divide the 4 layers"),
        (
            ParallelLayout(pp=2, virtual_pp=4),
            "--layout.virtual-pp 4 must divide the 4 layers",
        ),
        (ParallelLayout(virtual_pp=2), "virtual-pp needs --layout.pp > 1"),
        (ParallelLayout(sequence_parallel=True), "sequence-parallel needs --layout.tp > 1"),
        (
            ParallelLayout(overlap_grad_reduce=False, overlap_param_gather=True),
            "overlap-param-gather needs --layout.overlap-grad-reduce",
        ),
        (ParallelLayout(tp=0), "layout.tp must be at least 1, got 0"),
        (ParallelLayout(pp=-1), "layout.pp must be at least 1, got -1"),
    ],
)
def test_layout_that_cannot_hold_the_model_is_an_error(layout: ParallelLayout, cause: str):
    with pytest.raises(UserError, match=cause):
        layout.check(SIZE)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(virtual_pp=2),
        ParallelLayout(sequence_parallel=True),
        ParallelLayout(overlap_grad_reduce=False, overlap_param_gather=True),
    ],
)
def test_layout_that_holds_no_model_joins_no_ranks(layout: ParallelLayout):
    with pytest.raises(UserError, match="needs"):
        layout.dp(8)


@pytest.mark.parametrize("gains", [False, True])
def test_weights_are_gathered_meanwhile_only_where_gradients_are_summed_so(gains: bool):
    given = (None, False, True)
    layouts = {
        (reduce, gather): ParallelLayout(overlap_grad_reduce=reduce, overlap_param_gather=gather)
        for reduce in given
        for gather in given
        if (reduce, gather) != (False, True)  # an error
    }
    assert {key: layout.overlaps(gains=gains) for key, layout in layouts.items()} == {
        (None, None): (gains, gains),
        (None, False): (gains, False),
        (None, True): (True, True),
        (False, None): (False, False),
        (False, False): (False, False),
        (True, None): (True, gains),
        (True, False): (True, False),
        (True, True): (True, True),
    }


def test_vocabulary_must_split_evenly():
    size = dataclasses.replace(SIZE, num_heads=3, hidden_size=48)
    with pytest.raises(UserError, match="tp 3 must divide the padded vocabulary 128"):
        ParallelLayout(tp=3).check(size)


def test_shards_of_the_vocabulary_hold_whole_groups_of_columns():
    assert GROUP.value == VOCAB_GROUP
    size = dataclasses.replace(SIZE, num_heads=32, hidden_size=32)
    with pytest.raises(UserError, match="tp 32 cuts the padded vocabulary 128 into shards"):
        ParallelLayout(tp=32).check(size)
    ParallelLayout(tp=16).check(size)


def test_layouts_that_fit_are_silent():
    ParallelLayout(tp=4, sequence_parallel=True).check(SIZE)
    ParallelLayout(pp=2, virtual_pp=2).check(SIZE)
    ParallelLayout(cp=8).check(SIZE)
