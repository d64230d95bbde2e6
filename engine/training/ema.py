"""Running average of a policy's weights in fp32 (InstructGPT, C.4: decay 0.992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.training.optimizer import Optimizer, Owned


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

    def owned_shadows(self) -> list[Owned]:
        """Return the average of this rank's shards."""
        owned = zip(self.optimizer.owned_masters(), self.shadows, strict=True)
        return [(parameter, bounds, shadow) for (parameter, bounds, _), shadow in owned]

    def _masters(self) -> list[Tensor]:
        return [master for _, _, master in self.optimizer.owned_masters()]

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, master in zip(self.shadows, self._masters(), strict=True):
            kept = master.clone()
            master.copy_(shadow)
            shadow.copy_(kept)
        self.optimizer.sync_weights()
