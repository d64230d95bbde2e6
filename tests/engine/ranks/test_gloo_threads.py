import os

import torch
import torch.distributed as dist

from engine.ranks.gloo_threads import keep_out_of_openmp
from tests.ranks import run_ranks


def _new_threads(keeps_out: bool) -> int:
    """Threads that large collectives add to a rank whose main thread has a team of two."""
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)
    group = dist.group.WORLD
    before = len(os.listdir("/proc/self/task"))
    if keeps_out:
        keep_out_of_openmp([group])  # which opens none itself
    mine = torch.ones(1 << 18)
    for _ in range(10):  # enough for both threads of the group to take some
        gathered = [torch.empty_like(mine) for _ in range(2)]
        messages = [dist.all_gather(gathered, mine, async_op=True) for _ in range(4)]
        for message in messages:
            message.wait()
    assert torch.get_num_threads() == 2
    return len(os.listdir("/proc/self/task")) - before


def test_gloos_threads_open_teams_unless_they_are_kept_out() -> None:
    assert min(run_ranks(_new_threads, 2, False)) > 0  # or there is nothing to keep out of
    assert run_ranks(_new_threads, 2, True) == [0, 0]
