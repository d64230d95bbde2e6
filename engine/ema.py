"""Running average of a policy's weights in fp32 (InstructGPT, C.4: decay 0.992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from engine.optimizer import Optimizer


class EMA:
    """shadow <- decay x shadow + (1 - decay) x weights, over the optimizer's fp32 masters.

    The masters are sharded over data-parallel ranks, and so is the shadow: 4 bytes a parameter over
    dp. The paper does not say what the decay counts; our choice is one update an optimizer step.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer = optimizer
        self.decay = decay
        self.shadows = [master.detach().clone() for master in self._masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights after an optimizer step."""
        torch._foreach_lerp_(self.shadows, self._masters(), 1.0 - self.decay)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Run a block with the network holding the averaged weights; the trained ones come back
        after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def full_weights(self) -> dict[torch.nn.Parameter, Tensor]:
        """Return the averaged fp32 weights of this rank's tp and pp share in host memory, joined
        over data-parallel ranks; the device holds one parameter of them at a time."""
        owned = {
            parameter: (shard_range, shadow)
            for (parameter, shard_range, _), shadow in zip(self._owned(), self.shadows, strict=True)
        }
        full = {}
        group = self.optimizer.network.parallel.replica_group
        for module in self.optimizer.network.modules:
            for parameter in module.parameters():  # the same order on every rank
                whole = torch.zeros_like(parameter, dtype=torch.float32)
                if parameter in owned:  # else other ranks hold all of it
                    shard_range, shadow = owned[parameter]
                    whole.view(-1)[shard_range] = shadow
                dist.all_reduce(whole, group=group)
                full[parameter] = whole.cpu()
        return full

    def load_full_weights(self, full: dict[torch.nn.Parameter, Tensor]) -> None:
        """Take this rank's shards out of full_weights()."""
        for (parameter, shard_range, _), shadow in zip(self._owned(), self.shadows, strict=True):
            shadow.copy_(full[parameter].view(-1)[shard_range])

    def _masters(self) -> list[Tensor]:
        return [master for _, _, master in self._owned()]

    def _owned(self) -> list[tuple[torch.nn.Parameter, slice, Tensor]]:
        return self.optimizer.owned_masters()

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, master in zip(self.shadows, self._masters(), strict=True):
            kept = master.clone()
            master.copy_(shadow)
            shadow.copy_(kept)
        self.optimizer.sync_weights()
