"""Context parallelism: the tokens of one packed row on several ranks.

A row of T tokens is cut into 2 cp pieces of one length. Rank r of cp holds the pieces r and
2 cp - 1 - r: late tokens of a long sequence see more keys than early ones, and so every rank has
as much to do. All that is done token by token, each rank does for its own. Attention gathers the
keys and values of the row, one layer at a time; the head's readings are gathered at the end.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ContextShare:
    """This rank's part of a packed row."""

    group: ProcessGroup
    num_tokens: int
    """T of the whole row, a multiple of 2 cp."""

    @property
    def pieces(self) -> tuple[range, range]:
        """The tokens that this rank holds by their index in the row, in the order it holds them."""
        cp, rank = self.group.size(), self.group.rank()
        length = self.num_tokens // (2 * cp)
        starts = rank * length, (2 * cp - 1 - rank) * length
        return range(starts[0], starts[0] + length), range(starts[1], starts[1] + length)

    def held(self, device: torch.device) -> Tensor:
        """The same as a tensor [T / cp] int64."""
        return torch.cat([torch.arange(p.start, p.stop, device=device) for p in self.pieces])


def gather_row(x: Tensor, share: ContextShare) -> Tensor:
    """Return all ranks' x [T / cp, ...] in the order of the row [T, ...].

    For what every rank puts to a use of its own, such as keys: the gradients of all are summed.
    """
    return _GatherRow.apply(x, share.group, True)


def join_readings(x: Tensor, share: ContextShare) -> Tensor:
    """Return all ranks' x [..., T / cp] in the order of the row [..., T].

    For what every rank puts to the same use, such as values that go into a loss: each rank's own
    gradient is complete.
    """
    return _GatherRow.apply(x.movedim(-1, 0), share.group, False).movedim(0, -1)


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sums: bool) -> Tensor:
        ctx.group, ctx.sums = group, sums
        gathered = x.new_empty(group.size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        first, second = gathered.unflatten(0, (group.size(), 2, -1)).unbind(1)
        return torch.cat([first, second.flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cp = ctx.group.size()
        first, second = grad.unflatten(0, (2, cp, -1))
        by_rank = torch.stack([first, second.flip(0)], 1)  # [cp, 2, T / 2 cp, ...]
        if not ctx.sums:
            return by_rank[ctx.group.rank()].flatten(0, 1), None, None
        by_rank = by_rank.flatten(0, 2)
        mine = grad.new_empty(len(grad) // cp, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, by_rank, group=ctx.group)
        return mine, None, None
