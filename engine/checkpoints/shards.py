"""How the state of a network and its optimizer lies in the files of a checkpoint.

Every rank writes and reads its own part of optimizer state and averages, in boxes of the whole
tensors: nothing is gathered. Replicas share the weights: one writes a tensor, one reads it for all.
"""

import dataclasses
import math
import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from engine.checkpoints.boxes import boxes
from engine.training.network import Network
from engine.training.optimizer import Optimizer, Owned

# Through this queue megatron's writer hands what it wrote to the rank that waits for it. Its own
# is served by one more process a rank, which imports the recipe anew; ours writes and waits in one
# process, where a plain queue does.
filesystem_async._results_queue = queue.Queue()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Where a rank's part of a tensor lies in the whole one, as a checkpoint has it."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_written: bool
    """Whether this rank writes the part; others hold it too and only read it."""


def shards_of(network: Network) -> list[Shard]:
    """Return this rank's parts of the network's tensors.

    A tensor of every layer is one tensor in the checkpoint, the layer its first dimension.
    """
    return [
        Shard(
            name=tensor.key,
            global_shape=tuple(tensor.global_shape),
            offset=tuple(tensor.global_offset),
            shape=(1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
            is_written=is_main_replica(tensor.replica_id),
        )
        for tensor in _sharded_tensors(sharded_weights(network))
    ]


def sharded_weights(network: Network) -> dict[str, Any]:
    """Return the weights of this rank's chunks as megatron's sharded tensors, by chunk and name."""
    network.settle()
    with network.parallel.active():
        return {
            f"chunk{number}": module.sharded_state_dict()
            for number, module in enumerate(network.modules)
        }


def sharded_optimizer(optimizer: Optimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the fp32 masters and moments that this rank owns, named as in megatron's
    `fully_reshardable` form. That form would join the state of all replicas on each rank."""
    state = {
        name: owned_parts(weights, owned, prefix=f"optimizer.state.{name}.")
        for name, owned in optimizer.owned_state().items()
    }
    return {"param_state": state}


def owned_parts(
    weights: dict[str, Any], owned: list[Owned], prefix: str = ""
) -> dict[str, ShardedTensor]:
    """Return what this rank owns of tensors that are cut up as the weights are, as boxes of the
    whole tensors; they share the owned tensors' memory."""
    weight_of = {weight.data: weight for weight in _sharded_tensors(weights)}
    found: dict[str, ShardedTensor] = {}
    for parameter, bounds, owned_tensor in owned:
        weight, position = weight_of[parameter], 0
        stacked = weight.prepend_axis_num  # dimensions of the whole alone: the layer's
        for offset, shape in boxes(weight.local_shape, bounds.start, bounds.stop):
            count = math.prod(shape)
            data = owned_tensor[position : position + count].view((1,) * stacked + shape)
            position += count
            begins = zip(weight.global_offset, (0,) * stacked + offset, strict=True)
            found[str(len(found))] = dataclasses.replace(
                weight,
                key=prefix + weight.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=tuple(whole + part for whole, part in begins),
                axis_fragmentations=None,  # boxes are no regular grid
                prepend_axis_num=0,
                replica_id=(*weight.replica_id[:2], 0),  # pp and tp may hold it too, dp does not
            )
    return found


def write_state(state: dict[str, Any], folder: Path, network: Network) -> None:
    """Write the tensors that the state describes, and its other values; all ranks call together."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    group = network.parallel.replica_group
    shared = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(state, str(folder), sharded_strategy=shared)


def read_state(state: dict[str, Any], folder: Path, network: Network) -> dict[str, Any]:
    """Fill the tensors that the state describes, each in its place; return the state with them."""
    group = network.parallel.replica_group
    shared = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    return dist_checkpointing.load(state, str(folder), sharded_strategy=shared)


def _sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    return [
        v for tensors in state.values() for v in tensors.values() if isinstance(v, ShardedTensor)
    ]


def without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return what of a sharded state is no tensor: modules' other state."""
    return {
        chunk: {name: v for name, v in entries.items() if not isinstance(v, ShardedTensor)}
        for chunk, entries in state.items()
    }


def adopt(network: Network, loaded: dict[str, Any], *, strict: bool = True) -> None:
    """Take over the weights that read_state returned; strict: there must be all of them."""
    for number, module in enumerate(network.modules):
        module.load_state_dict(loaded[f"chunk{number}"], strict=strict)
    network.mark_changed()
