"""Whether the nodes of a job are fit for it: asked before it starts, answered with the names of
those that are not.

Ranks meet through a store and report through it, so that a node can be named whose network hangs.
"""

import dataclasses
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from engine.environment import (
    attempt_of_environment,
    rank_of_environment,
    world_size_of_environment,
)
from engine.preflight.facts import (
    GIB,
    Facts,
    cache_error,
    disk_facts,
    free_memory,
    versions,
)
from engine.preflight.faults import Fault, find_faults, named_ranks, report
from engine.preflight.links import measure_links
from engine.printable import say
from engine.ranks.device import start_device
from engine.ranks.start import open_store
from engine.settings.preflight import PreflightConfig


def preflight(config: PreflightConfig) -> NoReturn:
    """Check the nodes of this launch, say what was found, and end the process: with status 1 where
    a node is not fit."""
    rank = rank_of_environment()
    facts, faults = check_nodes(config)
    if rank == 0 or not facts:  # without rank 0, whoever misses it says so
        say(report(facts), end="")
        for fault in faults:
            say(f"preflight: {fault.node}: {fault.message}", stream=sys.stderr)
    os._exit(1 if faults else 0)  # the thread that measures may hang


def check_nodes(
    config: PreflightConfig, store: dist.Store | None = None
) -> tuple[list[Facts], list[Fault]]:
    """Return what all ranks found, and the faults in it, the same on every rank that takes part.

    Where ranks are silent there are no facts, only the names of their nodes.
    """
    device = start_device()
    rank, world_size = rank_of_environment(), world_size_of_environment()
    timeout = datetime.timedelta(seconds=config.timeout_s)
    node = socket.gethostname()
    if config.nodes and node not in config.nodes:  # the scheduler may call it by another name
        node = _node_of(rank, world_size, config.nodes)
    try:
        store = store or _own_part(open_store(timeout))
        meeting = Meeting(store=store, rank=rank, world_size=world_size)
        nodes = exchange(meeting, "nodes", node, timeout)
        clock = time.time()  # what was exchanged reaches all at once
        if len(nodes) < world_size:
            return [], _silent_faults(nodes, world_size, config)
        facts = Facts(
            rank=rank,
            node=node,
            versions=versions(),
            free_gib=free_memory(device) / GIB,
            clock=clock,
            **disk_facts(config.directory, rank),
            cache_error=cache_error(rank),
            gb_s=measure_links(config, store, [nodes[r] for r in range(world_size)], rank, device),
        )
        text = json.dumps(dataclasses.asdict(facts))
        texts = exchange(meeting, "facts", text, 2 * timeout)
    except dist.DistError:  # the store is rank 0's
        name = _node_of(0, world_size, config.nodes)
        return [], [Fault(name, f"rank 0 did not answer in {config.timeout_s:g} s")]
    if len(texts) < world_size:
        return [], _silent_faults(texts, world_size, config)
    gathered = [Facts(**json.loads(texts[r])) for r in range(world_size)]
    return gathered, find_faults(gathered, config)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where ranks meet, and who comes there."""

    store: dist.Store
    """Of rank 0's process; it knows neither the rank nor how many there are."""
    rank: int
    world_size: int


def exchange(
    meeting: Meeting, name: str, value: str, timeout: datetime.timedelta
) -> dict[int, str]:
    """Return the values of the ranks that gave one before rank 0 had waited for `timeout`.

    Raises dist.DistError where rank 0 falls silent.
    """
    store, rank, world_size = meeting.store, meeting.rank, meeting.world_size
    store.set(f"{name}/{rank}", value)
    if rank == 0:
        keys = {r: f"{name}/{r}" for r in range(world_size)}
        try:
            store.wait(list(keys.values()), timeout)
        except dist.DistError:
            keys = {r: key for r, key in keys.items() if store.check([key])}
        store.set(name, json.dumps({r: store.get(key).decode() for r, key in keys.items()}))
    store.wait([name], 3 * timeout)  # rank 0 may have begun later
    values = {int(r): value for r, value in json.loads(store.get(name)).items()}
    # The store ends with rank 0, which therefore leaves last.
    if rank in values and store.add(f"{name} readers", 1) == len(values):
        store.set(f"{name} read", "")
    if rank == 0:
        store.wait([f"{name} read"], timeout)
    return values


def _own_part(store: dist.Store) -> dist.Store:
    """Return what torchrun's store has for this start alone: it keeps what ranks of before said."""
    return dist.PrefixStore(f"preflight/{attempt_of_environment()}", store)


def _silent_faults(
    answers: dict[int, str], world_size: int, config: PreflightConfig
) -> list[Fault]:
    """Return a fault a node whose ranks are not among those that answered."""
    by_node: dict[str, list[int]] = {}
    for r in range(world_size):
        if r not in answers:
            by_node.setdefault(_node_of(r, world_size, config.nodes), []).append(r)
    wait = f"did not answer in {config.timeout_s:g} s"
    return [Fault(node, f"{named_ranks(ranks)} {wait}") for node, ranks in by_node.items()]


def _node_of(rank: int, world_size: int, nodes: Sequence[str]) -> str:
    """Return the node that a rank was dealt to, where ranks fill one node after the other."""
    if not nodes or world_size % len(nodes):
        return "a node without a name"
    return nodes[rank // (world_size // len(nodes))]
