"""Which parts of weights, optimizer state and averages a rank holds, and where they lie in the
whole tensors that a checkpoint has.

Every rank writes and reads its own part of optimizer state and averages, in boxes of the whole
tensors: nothing is gathered. Replicas share the weights: one writes a tensor, one reads it for all.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from engine.checkpoints.boxes import boxes
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer, Owned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Where a rank's part of a tensor lies in the whole one, as a checkpoint has it."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_written: bool
    """Whether this rank or a data-parallel replica of it writes the part; others only read it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A shard and its numbers."""

    shard: Shard
    tensor: Tensor
    """Of the shard's shape; it shares the memory of what is trained."""


def shards_of(network: Network) -> list[Shard]:
    """Return this rank's parts of the network's tensors.

    A tensor of every layer is one tensor in the checkpoint, the layer its first dimension.
    """
    return [part.shard for part in weight_parts(network)]


def weight_parts(network: Network) -> list[Part]:
    """Return the weights of this rank, which all its replicas hold."""
    return [
        _part(
            tensor,
            name=tensor.key,
            offset=tuple(tensor.global_offset),
            shape=(1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
            data=tensor.data,
        )
        for tensor in _sharded_weights(network)
    ]


def optimizer_parts(optimizer: Optimizer) -> list[Part]:
    """Return the fp32 masters and moments that this rank owns, named as in megatron's
    `fully_reshardable` form. That form would join the state of all replicas on each rank."""
    weights = list(_sharded_weights(optimizer.network))
    return [
        part
        for name, owned in optimizer.owned_state().items()
        for part in _owned_parts(weights, owned, prefix=f"optimizer.state.{name}.")
    ]


def average_parts(average: EMA) -> list[Part]:
    """Return what this rank owns of the averaged weights, under the names of the weights."""
    weights = list(_sharded_weights(average.optimizer.network))
    return list(_owned_parts(weights, average.owned_shadows()))


def dealt(parts: Sequence[Part], num_ranks: int) -> list[int]:
    """Return which of the ranks that all hold these parts writes or reads each: about as many bytes
    a rank, and the same answer on all."""
    total, before, owners = sum(part.tensor.nbytes for part in parts), 0, []
    for part in parts:
        middle = before + part.tensor.nbytes // 2
        owners.append(min(num_ranks - 1, middle * num_ranks // max(1, total)))
        before += part.tensor.nbytes
    return owners


def _sharded_weights(network: Network) -> Iterator[ShardedTensor]:
    """Yield the weights of this rank's chunks as megatron describes them: each of them, once."""
    network.settle()
    with network.parallel.active():
        for module in network.modules:
            state = module.sharded_state_dict()
            found = [v for v in state.values() if isinstance(v, ShardedTensor)]
            named = {id(tensor.data) for tensor in found}
            missing = [n for n, p in module.named_parameters() if id(p) not in named]
            if missing:
                raise RuntimeError(f"megatron describes no {missing[0]} for checkpoints")
            yield from found


def _owned_parts(
    weights: Sequence[ShardedTensor], owned: Sequence[Owned], prefix: str = ""
) -> Iterator[Part]:
    """Yield what this rank owns of tensors that are cut up as the weights are, as boxes of the
    whole tensors; they share the owned tensors' memory."""
    weight_of = {id(weight.data): weight for weight in weights}
    for parameter, bounds, owned_tensor in owned:
        weight, position = weight_of[id(parameter)], 0
        stacked = weight.prepend_axis_num  # dimensions of the whole alone: the layer's
        for offset, shape in boxes(weight.local_shape, bounds.start, bounds.stop):
            count = math.prod(shape)
            begins = zip(weight.global_offset, (0,) * stacked + offset, strict=True)
            yield _part(
                weight,
                name=prefix + weight.key,
                offset=tuple(whole + part for whole, part in begins),
                shape=(1,) * stacked + shape,
                data=owned_tensor[position : position + count],
            )
            position += count


def _part(
    weight: ShardedTensor,
    *,
    name: str,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    data: Tensor,
) -> Part:
    # Ranks of other stages or tensor-parallel places may hold a weight too; the last is dp's.
    is_written = tuple(weight.replica_id[:2]) == (0, 0)
    return Part(
        shard=Shard(
            name=name,
            global_shape=tuple(weight.global_shape),
            offset=offset,
            shape=shape,
            is_written=is_written,
        ),
        tensor=data.detach().view(shape),
    )
