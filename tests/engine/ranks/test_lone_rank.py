import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.lone_rank import LONE, LoneRank, lone_groups
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.ranks import run_ranks


@pytest.fixture
def group() -> LoneRank:
    start_parallel(ParallelLayout(), seed=0)
    with lone_groups():
        return dist.new_group([0])


def numbers() -> Tensor:
    return torch.arange(6.0).view(2, 3)


def test_a_world_of_one_is_a_lone_rank() -> None:
    parallel = start_parallel(ParallelLayout(), seed=0)
    assert dist.get_backend() == LONE
    for found in (parallel.tp_group, parallel.dp_group, parallel.pp_group, parallel.replica_group):
        assert isinstance(found, LoneRank) and found.size() == 1 and found.rank() == 0


def test_what_is_reduced_or_broadcast_stays_as_it_is(group: LoneRank) -> None:
    x = numbers()
    dist.all_reduce(x, group=group)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    dist.reduce(x, dst=0, group=group)
    dist.broadcast(x, src=0, group=group)
    dist.barrier(group=group)
    assert torch.equal(x, numbers())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 has other names for two of them
@pytest.mark.parametrize(
    "collective", [dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single]
)
def test_a_tensor_arrives_in_another(group: LoneRank, collective) -> None:
    output = torch.empty(2, 3)
    collective(output, numbers(), group=group)
    assert torch.equal(output, numbers())
    collective(flat := torch.empty(6), numbers().flatten(), group=group)
    assert torch.equal(flat, numbers().flatten())


def test_lists_of_tensors_arrive_in_others(group: LoneRank) -> None:
    for collective in (dist.all_gather, dist.gather, dist.all_to_all):
        outputs = [torch.empty(2, 3)]
        source = [numbers()] if collective is dist.all_to_all else numbers()
        if collective is dist.gather:
            collective(source, outputs, dst=0, group=group)
        else:
            collective(outputs, source, group=group)
        assert torch.equal(outputs[0], numbers()), collective
    for collective in (dist.scatter, dist.reduce_scatter):
        output = torch.empty(2, 3)
        collective(output, [numbers()], group=group)
        assert torch.equal(output, numbers()), collective


def test_objects_arrive(group: LoneRank) -> None:
    gathered: list = [None]
    dist.all_gather_object(gathered, {"a": 1}, group=group)
    assert gathered == [{"a": 1}]
    collected: list = [None]
    dist.gather_object("b", collected, dst=0, group=group)
    told = [("c", 2)]
    dist.broadcast_object_list(told, src=0, group=group)
    received: list = [None]
    dist.scatter_object_list(received, [3], src=0, group=group)
    assert (collected, told, received) == (["b"], [("c", 2)], [3])


def test_a_shard_in_its_own_buffer_is_not_copied(group: LoneRank) -> None:
    buffer = torch.ones(4)
    before = buffer._version
    dist.all_gather_into_tensor(buffer, buffer.view(1, 4)[0], group=group)
    assert buffer._version == before


def test_asynchronous_work_is_done_at_once(group: LoneRank) -> None:
    x = numbers()
    work = dist.all_reduce(x, group=group, async_op=True)
    assert work.is_completed() and work.wait()
    assert torch.equal(work.get_future().wait()[0], numbers())
    with dist._coalescing_manager(group, async_ops=True) as manager:
        dist.all_reduce(x, group=group, async_op=True)
    manager.wait()
    assert torch.equal(x, numbers())


def test_a_lone_rank_is_one() -> None:
    with pytest.raises(ValueError, match="a group of 2"):
        LoneRank(0, 2)


def _backends() -> tuple[str, str, float]:
    parallel = start_parallel(ParallelLayout(), seed=0)
    x = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(x, group=parallel.dp_group)
    dist.all_reduce(x, group=parallel.tp_group)
    return dist.get_backend(parallel.tp_group), dist.get_backend(parallel.dp_group), float(x)


def test_of_several_ranks_only_groups_of_one_are_lone() -> None:
    assert run_ranks(_backends, 2) == [(LONE, "gloo", 3.0)] * 2


def test_a_world_of_one_opens_no_second_team_of_threads() -> None:
    # gloo would take the gathered object to a thread whose copies open one.
    program = """
import os
import torch
import torch.distributed as dist
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
torch.set_num_threads(2)
start_parallel(ParallelLayout(), seed=0)
torch.zeros(1 << 20).add_(1)  # the main thread's team
before = len(os.listdir("/proc/self/task"))
dist.all_gather_object([None], bytes(1 << 20))
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "0"
