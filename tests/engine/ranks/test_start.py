import contextlib
import datetime
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.errors import UserError
from engine.ranks import start
from engine.ranks.device import communication_backend
from engine.ranks.groups import TIMEOUT
from engine.ranks.lone_rank import LONE
from engine.ranks.parallel import Parallel
from engine.ranks.start import (
    _check_address,
    _is_this_machine,
    end_parallel,
    pretended_rank,
    start_parallel,
)
from engine.settings.layout import ParallelLayout
from engine.settings.waiting import WaitingConfig


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


@pytest.mark.parametrize("address", ["", "no-such-node", "a" * 300, "b\u00fccher..example"])
def test_an_address_that_is_none_is_an_error_once_it_was_tried_for_a_while(
    address: str, monkeypatch: pytest.MonkeyPatch
):
    def look_up(address: str, port: None) -> None:
        address.encode("idna")  # as it does
        raise socket.gaierror(-2, "Name or service not known")

    waits: list[float] = []
    monkeypatch.setattr("engine.ranks.start.socket.getaddrinfo", look_up)
    monkeypatch.setattr("engine.ranks.start.time.sleep", waits.append)
    with pytest.raises(UserError, match="MASTER_ADDR is '.*': "):
        _check_address(address)
    assert waits == [1.0] * 4


def test_an_address_that_is_known_a_little_later_is_taken(monkeypatch: pytest.MonkeyPatch):
    answers = [socket.gaierror(-3, "Temporary failure in name resolution"), None]

    def look_up(address: str, port: None) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr("engine.ranks.start.socket.getaddrinfo", look_up)
    monkeypatch.setattr("engine.ranks.start.time.sleep", lambda seconds: None)
    _check_address("node-1")
    assert answers == []


class Met(dist.HashStore):
    """A store at which ranks meet; it knows how long it waits."""

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.waits = timeout
        super().set_timeout(timeout)


class Placed(Exception):
    """Ends a start where a rank's place is looked for: it has joined."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a start of one of two ranks comes to, none of which is done."""
    found: list[Any] = []

    def note(name: str, result: object = None) -> Callable[..., Any]:
        return lambda *words, **named: (found.append(name), result)[1]

    @contextlib.contextmanager
    def bounded(arrival: object) -> Iterator[None]:
        found.append("bounded")
        yield
        found.append("in time")

    def open_store(*address: object, is_master: bool, **named: object) -> dist.Store:
        found.append("opens" if is_master else "comes")
        return Met()

    def join(backend: str, *, store: Met, **named: object) -> None:
        found.append((backend, store.waits))

    def place(*words: object) -> None:
        raise Placed

    end_parallel()
    monkeypatch.setattr(start, "ending_where_stuck", bounded)
    monkeypatch.setattr(start, "_check_address", note("knows the address"))
    monkeypatch.setattr(start, "_await_listener", note("waits for a listener"))
    monkeypatch.setattr(start, "meet", lambda store, arrival: (found.append("meets"), store)[1])
    monkeypatch.setattr(start, "place_in", place)
    monkeypatch.setattr(start.dist, "TCPStore", open_store)
    monkeypatch.setattr(start.dist, "init_process_group", join)
    monkeypatch.setattr(start.failure, "listen", lambda waiting: found.append(waiting))
    monkeypatch.setattr(start, "_has_loopback", lambda: True)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    return found


WAITING = WaitingConfig(silence_seconds=9.0)


@pytest.mark.parametrize(
    ("rank", "has_store_of_launcher", "comes"),
    [
        (0, False, ["opens"]),
        (1, False, ["waits for a listener", "comes"]),
        (0, True, ["waits for a listener", "comes"]),  # torchrun has opened it
        (1, True, ["waits for a listener", "comes"]),
    ],
)
def test_ranks_meet_in_bounded_time_and_listen_from_then_on(
    rank: int,
    has_store_of_launcher: bool,
    comes: list[str],
    events: list[Any],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(has_store_of_launcher))
    with pytest.raises(Placed):
        start_parallel(ParallelLayout(tp=2), 0, WAITING)
    joined = ["bounded", "knows the address", *comes, "meets", "in time"]
    assert events == [*joined, (communication_backend(torch.device("cpu")), TIMEOUT), WAITING]
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # the other one is elsewhere


def test_ranks_of_one_machine_talk_over_its_loopback(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(Placed):
        start_parallel(ParallelLayout(tp=2), 0, WAITING)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_store_that_cannot_be_reached_is_one_line(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def fail(*words: object, **named: object) -> None:
        raise dist.DistNetworkError("no route to host\nframe #0")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(start.dist, "TCPStore", fail)
    with pytest.raises(UserError) as error:
        start_parallel(ParallelLayout(tp=2), 0, WAITING)
    assert str(error.value) == (
        "rank 1 of 2 found nobody to meet at 10.0.0.1:29500 within 90 s "
        "(--waiting.join-seconds): no route to host"
    )


def test_a_rank_alone_opens_no_port_and_listens_to_nobody(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def join(backend: str, *, store: dist.Store, **named: object) -> None:
        events.append((backend, type(store)))

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(start.dist, "init_process_group", join)
    with pytest.raises(Placed):
        start_parallel(ParallelLayout(), 0, WAITING)
    assert events == [(LONE, dist.HashStore)]


def test_who_leaves_the_ranks_listens_no_more(monkeypatch: pytest.MonkeyPatch):
    start_parallel(ParallelLayout(), 0)
    seen: list[bool] = []
    monkeypatch.setattr(start.failure, "part", lambda: seen.append(dist.is_initialized()))
    end_parallel()
    assert seen == [True]  # while there is a store to say so
    assert not dist.is_initialized()


def test_a_rank_that_is_none_waits_for_nobody(events: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2, and must be from 0 to 1"):
        start_parallel(ParallelLayout(tp=2), 0, WAITING)
    assert events == []


def test_a_port_that_is_taken_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch):
    end_parallel()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use"):
            start_parallel(ParallelLayout(tp=2), seed=0)
