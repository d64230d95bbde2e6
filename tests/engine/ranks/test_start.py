import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.ranks.parallel import Parallel
from engine.ranks.start import _is_this_machine, end_parallel, pretended_rank, start_parallel
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


RANK = """
import os, sys
from engine.ranks.start import end_parallel, start_parallel
from engine.settings.layout import ParallelLayout
import torch, torch.distributed as dist
start_parallel(ParallelLayout(tp=2), seed=0)
number = torch.ones(())
dist.all_reduce(number)
held = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()}
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}").readlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
            print("listens", *fields[1].split(":"))
print("sum", number.item())
dist.barrier()
end_parallel()
"""
HERE = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1, as the kernel has them


def has_loopback_of_ip6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_ranks_of_one_machine_are_reached_from_nowhere_else(address: str):
    if address == "::1" and not has_loopback_of_ip6():
        pytest.skip("needs IPv6")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    place |= {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in said:
        assert "sum 2.0" in text
        assert {where for where, _ in re.findall(r"listens (\w+) (\w+)", text)} <= HERE, text
    assert f" {port:04X}" in said[0]  # the store, which the first rank opened


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        *(("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True)),
        *(("10.0.0.1", False), ("fd00::2", False), ("0.0.0.0", False), ("node-1", False)),
        (socket.gethostname(), False),  # which may be 127.0.1.1 to itself, and no other
    ],
)
def test_a_name_that_is_another_machine_elsewhere_is_not_this_one(address: str, is_here: bool):
    assert _is_this_machine(address) == is_here


def test_a_port_that_is_taken_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch):
    end_parallel()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use"):
            start_parallel(ParallelLayout(tp=2), seed=0)
