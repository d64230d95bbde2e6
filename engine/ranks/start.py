"""How a process joins the other ranks, changes to another layout of them, and leaves."""

import contextlib
import datetime
import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from engine.environment import (
    check_launch,
    has_store_of_launcher,
    is_under_torchrun,
    rank_of_environment,
    world_size_of_environment,
)
from engine.errors import UserError, quoted
from engine.ranks import failure
from engine.ranks.device import communication_backend, meta_device, start_device
from engine.ranks.groups import TIMEOUT, forget_groups, place_in
from engine.ranks.likeness import start_in_words
from engine.ranks.lone_rank import LONE
from engine.ranks.meeting import Arrival, ending_where_stuck, meet, stay_away
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_initialisation
from engine.ranks.signs import in_phase
from engine.settings.layout import ParallelLayout
from engine.settings.waiting import WaitingConfig

_NUM_TRIES = 5  # at a name that is not known, a second apart; our choice
_DECLINING = 30.0  # seconds for a rank that does not come to say so; our choice
_has_come = False  # to the store, or on the way to it
_LOOPBACK = "lo"  # Linux's name of the interface that only the machine itself reaches


def open_store(timeout: datetime.timedelta) -> dist.Store:
    """Return the store through which this launch's ranks meet, at MASTER_ADDR:MASTER_PORT, without
    waiting for them.

    Rank 0 opens it where torchrun has not: to this machine alone, where the address says that all
    ranks are here. Raises dist.DistError when nothing answers there.
    """
    global _has_come
    _has_come = True
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "29500"))
    is_master = rank_of_environment() == 0 and not has_store_of_launcher()
    return dist.TCPStore(
        address,
        port,
        is_master=is_master,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=_listen_here(address, port)
        if is_master and _is_this_machine(address)
        else None,
    )


def _is_this_machine(address: str) -> bool:
    """Return whether an address leads to the machine itself wherever it is asked. A machine's own
    name may too, but not on the others, and is not looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _has_loopback() -> bool:
    return any(name == _LOOPBACK for _, name in socket.if_nameindex())


def _listen_here(address: str, port: int) -> int:
    """Return a socket, as a file descriptor that the store closes, which only this machine reaches:
    by itself the store listens on all of its addresses, and asks nobody who they are."""
    kind, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(where[:2], family=kind).detach()
    except OSError as error:
        raise UserError(
            f"the ranks cannot meet at {address}:{port}: {os.strerror(error.errno or 0)}; "
            "set MASTER_PORT to a port that is free"
        ) from None


def start_parallel(
    layout: ParallelLayout,
    seed: int,
    waiting: WaitingConfig | None = None,
    config: Any = None,
) -> Parallel:
    """Join the other ranks, build the process groups and seed this rank's generators.

    The ranks come from torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS;
    MASTER_ADDR and MASTER_PORT are recipes/slurm/launch.sh's); a process started by neither is a
    world of one. A second call in one process reuses the world. config: all that the ranks are to
    do. Raises UserError where not all come in time, or one is to do something else.
    """
    check_launch()
    device = start_device()
    rank = rank_of_environment()
    world_size = world_size_of_environment()
    layout.dp(world_size)  # or UserError, before any rank waits for another
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        waiting = waiting or WaitingConfig()
        config = {"layout": layout, "seed": seed} if config is None else config
        store = dist.HashStore() if world_size == 1 else _meet(rank, world_size, waiting, config)
        if _is_this_machine(os.environ["MASTER_ADDR"]) and _has_loopback():
            # By itself gloo listens on the address that the machine's name has.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        # No device_id: with it every group is split off the world by all ranks at once, whether
        # anyone uses it or not, and megatron makes 3,200 groups for tp 8 x pp 16 on 1,024 ranks.
        # And a pipeline's messages, which have a communicator for each pair of ranks and group,
        # would share one with all else of a group and run one after the other.
        dist.init_process_group(
            communication_backend(device) if world_size > 1 else LONE,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
        if world_size > 1:
            failure.listen(waiting)
    parallel = place_in(layout, seed, device)
    vars(parallel_state).update(parallel.state)
    seed_for_initialisation(parallel)
    return parallel


def _meet(rank: int, world_size: int, waiting: WaitingConfig, config: Any) -> dist.Store:
    """Return the store of this start's ranks, once all have come to it; raises UserError."""
    global _has_come
    _has_come = True  # what is wrong with the way is no news to whoever waits there
    arrival = Arrival(
        rank=rank,
        world_size=world_size,
        address=_address(),
        seconds=waiting.join_seconds,
        start=start_in_words(config, world_size),
    )
    with in_phase("meeting the other ranks", is_bounded=False), ending_where_stuck(arrival):
        _check_address(os.environ["MASTER_ADDR"])
        if rank > 0 or has_store_of_launcher():
            _await_listener(arrival)
        try:
            store = open_store(datetime.timedelta(seconds=waiting.join_seconds))
        except dist.DistError as error:
            raise UserError(arrival.unreachable(str(error).splitlines()[0])) from None
        store.set_timeout(TIMEOUT)
        return meet(store, arrival)


def decline(why: str) -> None:
    """Tell the other ranks, which wait for this one, that it does not come and why.

    Without effect where it has come, or is alone, or an agent of torchrun's sees it end and ends
    the others; and where nobody is reached in time. Nor where the launch names no MASTER_PORT: at
    the default one the ranks of any run may meet, and those would be told. To say it takes the
    libraries' import, and as long as the first rank takes to come: seconds.
    """
    rank, world_size = rank_of_environment(), world_size_of_environment()
    has_place = "MASTER_PORT" in os.environ
    if _has_come or world_size == 1 or is_under_torchrun() or not has_place:
        return
    arrival = Arrival(rank=rank, world_size=world_size, address=_address(), seconds=_DECLINING)
    with contextlib.suppress(UserError, dist.DistError), ending_where_stuck(arrival):
        if rank > 0:
            _await_listener(arrival)
        stay_away(open_store(datetime.timedelta(seconds=_DECLINING)), arrival, why)


def _address() -> str:
    place = (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"))
    return ":".join(os.environ.get(name, default) for name, default in place)


def _await_listener(arrival: Arrival) -> None:
    """Wait until somebody listens where the ranks meet; raises UserError. torch waits too, with its
    stack on stderr."""
    address, _, port = arrival.address.rpartition(":")
    last = time.monotonic() + arrival.seconds
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=arrival.seconds).close()
            return
        except OSError as error:
            if time.monotonic() > last:
                raise UserError(arrival.unreachable(error.strerror or str(error))) from None
        time.sleep(0.5)


def _check_address(address: str) -> None:
    """Raise UserError for an address that is none: torch would look for it as long as it waits."""
    for tries_left in reversed(range(_NUM_TRIES)):
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if not tries_left:
                why = getattr(error, "strerror", None) or str(error)
                raise UserError(f"MASTER_ADDR is {quoted(address)}: {why}") from None
            time.sleep(1.0)


def rearranged(parallel: Parallel, layout: ParallelLayout) -> Parallel:
    """Return this rank's place when the same ranks are laid out in another way; all call together.

    Networks of both layouts live side by side. The layout that was current stays so.
    """
    layout.dp(parallel.world_size)  # or UserError
    return place_in(layout, parallel.seed, parallel.device)


@contextlib.contextmanager
def pretended_rank(
    layout: ParallelLayout, *, world_size: int, tp_rank: int, pp_rank: int
) -> Iterator[Parallel]:
    """Be one rank of `world_size` that are not there, of the first data-parallel replica: networks
    built within the block lie on the meta device, with the groups they would have.

    torch's fake backend joins at once and its collectives do nothing. Raises RuntimeError where
    this process has joined real ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real world")
    layout.dp(world_size)  # or UserError
    # megatron deals ranks to tp first, then to dp, then to pp.
    rank = tp_rank + pp_rank * (world_size // layout.pp)
    with meta_device() as device:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            parallel = place_in(layout, 0, device)
            with parallel.active():
                yield parallel
        finally:
            end_parallel()


def end_parallel() -> None:
    """Leave the other ranks and forget the groups, where this process has joined any."""
    forget_groups()
    failure.part()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
