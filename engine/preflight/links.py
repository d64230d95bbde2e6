"""How fast the ranks of a job reach one another: in their nodes, over the links, all together.

The measurement runs in a thread, which a network that hangs never gives back.
"""

import datetime
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from engine.preflight.facts import Scope
from engine.ranks.device import synchronize
from engine.settings.preflight import PreflightConfig

# A group that is gone closes the connections of those that still measure: all stay to the end.
_kept: list[dist.Backend] = []


def groups_of(rank: int, nodes: Sequence[str]) -> list[tuple[Scope, list[int]]]:
    """Return the ranks to measure an all-reduce with, one group after the other: those of the node,
    the counterparts on both neighbours around the ring of nodes, and all.

    nodes: of every rank. All ranks go through the links in one order, so none waits in a circle.
    """
    by_node: dict[str, list[int]] = {}
    for r, name in enumerate(nodes):
        by_node.setdefault(name, []).append(r)
    members, index = list(by_node.values()), list(by_node).index(nodes[rank])
    number = members[index].index(rank)
    num_nodes = len(members)
    # A link is named by its first node. The even ones share no node, nor do the odd ones; in an odd
    # ring the last stands alone.
    links = range(num_nodes) if num_nodes > 2 else range(num_nodes - 1)
    last = num_nodes - 1
    rounds = sorted(links, key=lambda i: 2 if num_nodes % 2 and i == last else i % 2)
    groups: list[tuple[Scope, list[int]]] = [("node", members[index])]
    for first in rounds:
        ends = (first, (first + 1) % num_nodes)
        if index in ends and all(number < len(members[end]) for end in ends):
            groups.append(("link", sorted(members[end][number] for end in ends)))
    groups.append(("all", list(range(len(nodes)))))
    return [(scope, ranks) for scope, ranks in groups if len(ranks) > 1]


def measure_links(
    config: PreflightConfig,
    store: dist.Store,
    nodes: Sequence[str],
    rank: int,
    device: torch.device,
) -> dict[Scope, float]:
    """Return this rank's bandwidths by what they are of, 0 where one did not end in time."""
    groups = groups_of(rank, nodes)
    readings: list[float] = []

    def measure() -> None:
        for scope, ranks in groups:
            # Two groups may have the same ranks, which must not find one another's addresses.
            meeting = dist.PrefixStore(f"links/{scope}/{ranks}", store)
            group = _meet(ranks, rank, meeting, device, config)
            _kept.append(group)
            readings.append(_all_reduce_gb_s(group, config.payload_mib * 2**20, device))

    thread = threading.Thread(target=measure, daemon=True)
    if groups:
        thread.start()
        thread.join(config.timeout_s)
    best: dict[Scope, float] = {scope: 0.0 for scope, _ in groups}
    for (scope, _), reading in zip(groups, list(readings), strict=False):
        best[scope] = max(best[scope], reading)
    return best


def _meet(
    ranks: list[int], rank: int, meeting: dist.Store, device: torch.device, config: PreflightConfig
) -> Any:
    """Return a group of these ranks that no other rank need know of, as torch's new_group asks."""
    # The thread is given up before that; NCCL would end the process, and the report with it.
    timeout = datetime.timedelta(seconds=10 * config.timeout_s)
    group_class: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
    return group_class(meeting, ranks.index(rank), len(ranks), timeout)


def _all_reduce_gb_s(group: Any, num_bytes: int, device: torch.device) -> float:
    """Return the best bus bandwidth of three: 2 (n-1)/n x bytes / seconds, what a ring must move
    over its slowest link whatever n."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    _all_reduce(tensor, group)  # meets the others and sets up the connections
    synchronize(device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _all_reduce(tensor, group)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    size = group.size()
    return 2 * (size - 1) / size * num_bytes / min(seconds) / 1e9


def _all_reduce(tensor: torch.Tensor, group: Any) -> None:
    group.allreduce([tensor]).wait()
