import datetime
from typing import Any

import pytest
import torch

from engine.ranks.start import end_parallel, pretended_rank, start_parallel
from engine.settings.layout import ParallelLayout
from tests.ranks import run_ranks


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
