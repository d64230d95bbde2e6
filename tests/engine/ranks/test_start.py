from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.start import end_parallel, pretended_rank, start_parallel
from engine.settings.layout import ParallelLayout


@pytest.mark.parametrize("degree", [{"tp": 2}, {"tp": 0}, {"pp": 0}, {"cp": -1}])
def test_layout_of_more_ranks_than_there_are_is_an_error(degree: dict[str, int]):
    with pytest.raises(UserError):
        start_parallel(ParallelLayout(**degree), seed=0)


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


def test_a_pretended_rank_stands_where_megatron_deals_it():
    end_parallel()
    layout = ParallelLayout(tp=2, pp=2)
    with pretended_rank(layout, world_size=8, tp_rank=1, pp_rank=1) as parallel:
        # tp first, then dp, then pp: the second half of the ranks is the second stage.
        assert (parallel.rank, parallel.world_size, parallel.dp) == (5, 8, 2)
        assert (parallel.tp_rank, parallel.pp_rank, parallel.dp_rank) == (1, 1, 0)
        assert parallel.device == torch.device("meta")
    assert not torch.distributed.is_initialized()


def test_a_rank_of_a_real_world_pretends_nothing(parallel: Parallel):
    pretended = pretended_rank(parallel.layout, world_size=2, tp_rank=0, pp_rank=0)
    with pytest.raises(RuntimeError, match="a rank of a real world"), pretended:
        pass
    assert torch.distributed.is_initialized()


def test_a_second_start_reuses_the_world_and_seeds_anew(parallel: Parallel):
    drawn = []
    for seed in (5, 6, 5):
        again = start_parallel(ParallelLayout(), seed=seed)
        assert again.tp_group is parallel.tp_group
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[2] != drawn[1]
