"""Opens the connections between ranks that a run will use, while there is memory for them.

NCCL makes a communicator at a group's first collective, and one for a pair of ranks at its first
message, with memory from the driver. torch's allocator may hold by then what is left of the
device: a key-value cache takes most of what is free.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from engine.ranks.device import synchronize
from engine.ranks.parallel import Parallel

# megatron's groups that are used and that Parallel does not name: of the gradient norm and of tied
# embeddings. It makes a dozen more, for experts and the like, which would take memory for nothing.
_OF_MEGATRON = (
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
    "_EMBEDDING_GROUP",
    "_POSITION_EMBEDDING_GROUP",
)


def open_connections(parallels: Iterable[Parallel]) -> None:
    """Run one tiny collective on every group of these layouts, and one message along every hop of
    their pipelines. All ranks call together."""
    opened: set[dist.ProcessGroup] = set()
    for parallel in parallels:
        token = torch.zeros(1, device=parallel.device)
        for group in _groups(parallel):
            if group not in opened and group.size() > 1:
                dist.all_reduce(token, group=group)
        if parallel.pp_group not in opened:
            _open_hops(parallel, token)
        opened.update(_groups(parallel))
        synchronize(parallel.device)


def _groups(parallel: Parallel) -> list[dist.ProcessGroup]:
    """This rank's groups, each once, in the same order on all ranks."""
    named = [parallel.tp_group, parallel.pp_group, parallel.reply_group, parallel.dp_group]
    named += [parallel.cp_group, parallel.replica_group, _world()]
    named += [parallel.state[name] for name in _OF_MEGATRON]
    return list(dict.fromkeys(group for group in named if isinstance(group, dist.ProcessGroup)))


def _open_hops(parallel: Parallel, token: torch.Tensor) -> None:
    """Pass a message on from stage to stage; with virtual stages back to the first as well, where
    generation sends in a group of its own. Of two stages megatron lets one direction use all ranks'
    group."""
    pp, group = parallel.layout.pp, parallel.pp_group
    ranks = dist.get_process_group_ranks(group)
    hops = [(group, source, source + 1) for source in range(pp - 1)]
    if parallel.layout.virtual_pp > 1:
        hops += [(group, pp - 1, 0), (parallel.reply_group, pp - 1, 0)]
    if pp == 2:
        hops.append((_world(), 0, 1))
    for group, source, target in hops:
        if parallel.pp_rank == source:
            dist.send(token, dst=ranks[target], group=group)
        elif parallel.pp_rank == target:
            dist.recv(token, src=ranks[source], group=group)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # the ranks have joined
    return world
