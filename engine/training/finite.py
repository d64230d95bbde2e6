"""Whether weights are numbers: asked where they come from a file, and before they go to one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UserError
from engine.training.network import Network


def check_finite(network: Network, message: str, extra: Sequence[Tensor] = ()) -> None:
    """Raise UserError(message), on all ranks alike, unless the weights of every rank are finite,
    and `extra` too; all ranks call together.

    Weights that are not finite stay so whatever a run does, and spoil all that is made from them.
    """
    network.settle()
    weights = [p.detach() for module in network.modules for p in module.parameters()]
    # One number a tensor without a tensor of its size; in fp64, that no sum of finite ones is inf.
    sums = torch.stack([w.sum(dtype=torch.float64) for w in (*weights, *extra)])
    is_broken = (~sums.isfinite().all()).float()
    dist.all_reduce(is_broken, dist.ReduceOp.MAX)
    if is_broken.item():  # sync
        raise UserError(message)
