"""Weights that several ranks hold alike, compared by their bits: replicas, what tensor-parallel
ranks share, the embedding at both ends of a pipeline.

After a step replicas gather their weights from the same shards, so nothing but a flipped bit makes
them differ; no later step would say so, for gradients are summed. A bit of an fp32 master that has
flipped is gathered by all alike, and not seen here.
"""

from collections import Counter
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from engine.training.diagnosis import named_weights
from engine.training.digests import digests
from engine.training.network import Network
from engine.training.witness import end_if_seen, rank_in_words, some_of

_REMEDY = (
    "Nothing was applied or saved since, and the checkpoints before are as they were: a bit of a "
    "rank's memory has flipped, or a message was damaged. The same command goes on from the newest "
    "checkpoint; if it ends so again, leave that node out"
)


class _Alike(NamedTuple):
    """Weights that the ranks of a group hold alike."""

    group: dist.ProcessGroup
    names: list[str]
    weights: list[Tensor]


def check_copies(network: Network, where: str, role: str) -> None:
    """Raise UserError, on all ranks alike, where ranks differ in weights that they hold alike; all
    ranks call together.

    where: how far the run is, such as "step 7". Named are the ranks that differ from most of a
    group; where no bits are most's, all of it.
    """
    network.settle()
    parallel = network.parallel
    lines = []
    for alike in _alike(network):
        mine = digests(alike.weights, parallel.device)
        gathered = mine.new_empty(dist.get_world_size(alike.group) * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=alike.group)
        rows = gathered.view(-1, len(mine)).tolist()  # sync: in a step that is checked
        names = _outvoted(rows, dist.get_rank(alike.group), alike.names)
        if names:
            lines.append(f"{rank_in_words(parallel)}: {some_of(names)}")
    end_if_seen(
        lines,
        parallel,
        f"{where}: weights of the {role} that ranks hold alike differ in",
        _REMEDY,
    )


def _outvoted(rows: list[list[int]], rank: int, names: list[str]) -> list[str]:
    """Return the names of weights in which a rank of a group is not as most of it; where no bits
    are most's, of all that differ. rows: the digests of each rank."""
    found = []
    for name, *column in zip(names, *rows, strict=True):
        (most, count), *_ = Counter(column).most_common(1)
        has_most = 2 * count > len(column)
        if count < len(column) and (not has_most or column[rank] != most):
            found.append(name)
    return found


def _alike(network: Network) -> list[_Alike]:
    """Return the groups, of more than one rank, that this rank holds weights alike in; the ranks of
    a group find it in the same order."""
    parallel = network.parallel
    own = dict(named_weights(network))
    shared = {n: w for n, w in own.items() if not getattr(w, "tensor_model_parallel", False)}
    tied = {n: w for n, w in own.items() if getattr(w, "shared_embedding", False)}
    groups = [(parallel.replica_group, own), (parallel.tp_group, shared)]
    if tied and parallel.layout.pp > 1:
        groups.append((parallel.state["_EMBEDDING_GROUP"], tied))
    return [
        _Alike(group, list(weights), [weight.detach() for weight in weights.values()])
        for group, weights in groups
        if weights and dist.get_world_size(group) > 1
    ]
