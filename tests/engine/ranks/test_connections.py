import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine.ranks.connections import open_connections
from engine.ranks.start import rearranged, start_parallel
from engine.residency import residency
from engine.settings.layout import ParallelLayout
from tests.ranks import run_ranks
from tests.tiny import ppo_config, train

CALLS = ("allreduce", "broadcast", "allgather", "_allgather_base", "_reduce_scatter_base")
CALLS += ("reduce_scatter", "reduce_scatter_tensor_coalesced", "allgather_into_tensor_coalesced")
MESSAGES = ("send", "recv")
Used = set[tuple[tuple[int, ...], str]]


@contextlib.contextmanager
def used_connections() -> Iterator[Used]:
    """The groups of more than one rank that a block's collectives and messages use, by their ranks
    and name; of a message the two ranks."""
    used: Used = set()
    with pytest.MonkeyPatch.context() as patch:
        for name in (*CALLS, *MESSAGES):
            plain = getattr(dist.ProcessGroup, name)

            def call(self: Any, *args: Any, name: str = name, plain: Any = plain, **named: Any):
                ranks = dist.get_process_group_ranks(self)
                if name in MESSAGES:
                    ranks = sorted((ranks[args[1]], dist.get_rank()))
                if len(ranks) > 1:
                    used.add((tuple(ranks), self.group_name))
                return plain(self, *args, **named)

            patch.setattr(dist.ProcessGroup, name, call)
        yield used


def opened_and_used(files: Path, folder: Path) -> tuple[Used, Used]:
    """The connections opened before the first rollout, and those of the whole run after that."""
    opened: Used = set()

    def opening(parallels: Any) -> None:
        with used_connections() as found:
            open_connections(parallels)
        opened.update(found)
        used.clear()

    config = ppo_config(
        files,
        folder,
        layout=ParallelLayout(tp=2, pp=2, virtual_pp=2, sequence_parallel=True),
        critic_layout=ParallelLayout(tp=2, sequence_parallel=True),
        iterations=1,
    )
    with pytest.MonkeyPatch.context() as patch, used_connections() as used:
        patch.setattr(residency, "open_connections", opening)
        train(config)
    return opened, used


@pytest.mark.slow
def test_a_run_opens_no_connection_after_its_first_rollout_has_begun(tiny, tmp_path):
    for opened, used in run_ranks(opened_and_used, 4, tiny, tmp_path / "run"):
        assert used
        assert not used - opened


def opened_twice() -> list[Used]:
    layouts = ParallelLayout(pp=4), ParallelLayout(tp=2, pp=2, virtual_pp=2)
    first = start_parallel(layouts[0], seed=0)
    found = []
    for parallels in ([first], [first, first, rearranged(first, layouts[1])]):
        with used_connections() as used:
            open_connections(parallels)
        found.append(used)
    return found


def test_every_hop_of_a_pipeline_is_opened_and_no_rank_waits():
    for rank, (one, both) in enumerate(run_ranks(opened_twice, 4)):
        pairs = {ranks for ranks, _ in one if len(ranks) == 2}
        hops = {(0, 1), (1, 2), (2, 3)}
        assert {hop for hop in hops if rank in hop} == {pair for pair in pairs if pair in hops}
        assert one < both


def test_one_rank_has_nothing_to_open():
    parallel = start_parallel(ParallelLayout(), seed=0)
    with used_connections() as used:
        open_connections([parallel])
    assert not used
