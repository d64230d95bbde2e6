from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.ranks.start import end_parallel, start_parallel
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
