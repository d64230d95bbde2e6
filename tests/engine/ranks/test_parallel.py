import dataclasses
import datetime
from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_head, seed_for_initialisation, seed_for_step
from engine.ranks.start import end_parallel, pretended_rank, start_parallel
from engine.settings.layout import ParallelLayout
from kernels.philox import GROUP
from models.sizes import VOCAB_GROUP, GPTSize
from tests.ranks import run_ranks

SIZE = GPTSize(num_layers=4, hidden_size=32, num_heads=4, vocab_size=100, context_length=64)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=5)


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
        (ParallelLayout(pp=3), "pp 3 x virtual_pp 1 must divide the 4 layers"),
        (ParallelLayout(pp=2, virtual_pp=4), "pp 2 x virtual_pp 4 must divide the 4 layers"),
        (ParallelLayout(virtual_pp=2), "virtual_pp needs layout.pp > 1"),
        (ParallelLayout(sequence_parallel=True), "sequence_parallel needs layout.tp > 1"),
        (
            ParallelLayout(overlap_grad_reduce=False, overlap_param_gather=True),
            "overlap_param_gather needs layout.overlap_grad_reduce",
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


@pytest.mark.parametrize("degree", [{"tp": 2}, {"tp": 0}, {"pp": 0}, {"cp": -1}])
def test_layout_of_more_ranks_than_there_are_is_an_error(degree: dict[str, int]):
    with pytest.raises(UserError):
        start_parallel(ParallelLayout(**degree), seed=0)


def test_a_process_alone_is_a_world_of_one(parallel: Parallel):
    assert (parallel.rank, parallel.world_size, parallel.dp) == (0, 1, 1)
    assert parallel.is_writer
    assert parallel.is_first_stage
    assert parallel.is_last_stage
    assert parallel.last_stage_rank == 0


def test_every_step_and_seed_draws_other_numbers(parallel: Parallel):
    def draw(parallel: Parallel, step: int) -> float:
        seed_for_step(parallel, step)
        return torch.rand(()).item()

    drawn = [draw(parallel, step) for step in range(4)]
    drawn.append(draw(dataclasses.replace(parallel, seed=6), 0))
    drawn.append(draw(dataclasses.replace(parallel, dp_rank=1), 0))
    drawn.append(draw(dataclasses.replace(parallel, pp_rank=1), 0))
    assert len(set(drawn)) == len(drawn)
    assert draw(parallel, 2) == drawn[2]


def test_initial_weights_are_alike_on_data_parallel_ranks_only(parallel: Parallel):
    def draw(parallel: Parallel) -> float:
        seed_for_initialisation(parallel)
        return torch.rand(()).item()

    first = draw(parallel)
    assert draw(dataclasses.replace(parallel, dp_rank=1)) == first
    assert draw(dataclasses.replace(parallel, pp_rank=1)) != first


def test_heads_are_alike_on_every_rank(parallel: Parallel):
    def draw(parallel: Parallel) -> float:
        seed_for_head(parallel)
        return torch.rand(()).item()

    first = draw(parallel)
    assert draw(dataclasses.replace(parallel, pp_rank=1, dp_rank=1, tp_rank=1)) == first
    assert draw(dataclasses.replace(parallel, seed=6)) != first


def test_all_groups_wait_equally_long(monkeypatch: pytest.MonkeyPatch):
    new_group, timeouts = torch.distributed.new_group, []

    def noted(*args: Any, **named: Any) -> Any:
        timeouts.append(named["timeout"])
        return new_group(*args, **named)

    end_parallel()
    monkeypatch.setattr("torch.distributed.new_group", noted)
    with pretended_rank(ParallelLayout(tp=2, pp=2), world_size=8, tp_rank=0, pp_rank=0):
        assert len(timeouts) > 20
        assert set(timeouts) == {datetime.timedelta(minutes=30)}


def test_groups_are_connected_when_they_are_used(monkeypatch: pytest.MonkeyPatch):
    """A world that is bound to a device splits every one of its groups off at once."""

    class Joined(Exception):
        pass

    def join(*args: Any, **named: Any) -> None:
        raise Joined(named.get("device_id"))

    end_parallel()
    monkeypatch.setattr("engine.ranks.start.start_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.distributed.init_process_group", join)
    with pytest.raises(Joined, match="None"):
        start_parallel(ParallelLayout(), seed=0)


def place_of_rank(layouts: list[ParallelLayout]) -> list[tuple]:
    """This rank's place under one layout after the other, and what its groups add up."""
    places = []
    for layout in layouts:
        parallel = start_parallel(layout, seed=0)
        sums = []
        for group in (parallel.tp_group, parallel.pp_group, parallel.dp_group):
            rank = torch.tensor(10.0**parallel.rank)  # decimal digits name the members
            torch.distributed.all_reduce(rank, group=group)
            sums.append(int(rank))
        places.append(
            (parallel.tp_rank, parallel.pp_rank, parallel.dp_rank, parallel.last_stage_rank, *sums)
        )
    return places


@pytest.mark.slow  # test_layout_invariance.py stands on the same, and is not
def test_groups_join_the_ranks_of_their_axis_and_can_be_built_anew():
    layouts = [ParallelLayout(tp=2), ParallelLayout(pp=2), ParallelLayout()]
    assert run_ranks(place_of_rank, 2, layouts) == [
        [(0, 0, 0, 0, 11, 1, 1), (0, 0, 0, 1, 1, 11, 1), (0, 0, 0, 0, 1, 1, 11)],
        [(1, 0, 0, 1, 11, 10, 10), (0, 1, 0, 1, 10, 11, 10), (0, 0, 1, 1, 10, 10, 11)],
    ]
