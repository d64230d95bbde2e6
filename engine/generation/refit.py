"""Copies a network's weights into another parallel layout of the same ranks, for generation.

A pipeline generates slowly: every token passes all stages. Refit gives the same ranks a second
network of more tensor or data parallelism, filled through megatron-core's resharding plan. The copy
carries the version of the weights that it was made from, and generate() refuses one that is stale.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.resharding import reshard_model_weights
from megatron.core.resharding.copy_services.base import CopyService
from torch import Tensor

from engine.config import UserError
from engine.device import synchronize
from engine.network import Network, build_network
from engine.parallel import rearranged
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """What one refit cost this rank."""

    received_bytes: int
    """From other ranks; what this rank held already is copied in place."""
    seconds: float


class Refit:
    """A language model's copy in a generation layout. All ranks make it and call it together."""

    def __init__(self, source: Network, layout: ParallelLayout, *, numerics: Numerics) -> None:
        """numerics: of the source. Raises UserError for a layout that refit cannot fill."""
        if layout.cp > 1 or source.parallel.layout.cp > 1:
            raise UserError("refit goes between layouts without context parallelism (cp 1)")
        if layout.pp > 1 or source.parallel.layout.virtual_pp > 1:
            raise UserError(
                "refit goes from a layout without virtual stages to one without pipeline, not from "
                f"virtual_pp {source.parallel.layout.virtual_pp} to pp {layout.pp}"
            )
        self.source = source
        parallel = rearranged(source.parallel, layout)
        self.network = build_network("language", source.size, parallel, numerics=numerics)
        self.network.source = source
        self.network.weights_version = -1  # never filled

    @torch.no_grad()
    def __call__(self) -> RefitReport:
        """Bring the copy up to date."""
        synchronize(self.source.parallel.device)
        started = time.perf_counter()
        service = _Exchange()
        self.source.settle()
        with self.source.parallel.active():
            reshard_model_weights(self.source.modules, self.network.modules, service)
        synchronize(self.source.parallel.device)
        self.network.weights_version = self.source.weights_version
        return RefitReport(
            received_bytes=service.received_bytes, seconds=time.perf_counter() - started
        )


class _Exchange(CopyService):
    """The copies of one refit: within the rank by hand, between ranks in one batch of messages.

    megatron-core's own services want a CUDA stream, also for gloo. Both sides of a pair submit
    their messages in the order of the plan, so they match without tags.
    """

    def __init__(self) -> None:
        self.received_bytes = 0
        self._messages: list[dist.P2POp] = []
        self._local_sources: dict[int, Tensor] = {}
        self._local_targets: dict[int, Tensor] = {}

    def submit_send_with_id(self, task_id: int, src_tensor: Tensor, dest_rank: int) -> None:
        """Register a part of this rank's weights that another rank, or this one, wants."""
        if dest_rank == dist.get_rank():
            self._local_sources[task_id] = src_tensor
        else:
            self._messages.append(dist.P2POp(dist.isend, src_tensor, dest_rank))

    def submit_recv_with_id(self, task_id: int, dest_tensor: Tensor, src_rank: int) -> None:
        """Register a part that this rank wants, into a buffer that the plan copies from."""
        if src_rank == dist.get_rank():
            self._local_targets[task_id] = dest_tensor
        else:
            self._messages.append(dist.P2POp(dist.irecv, dest_tensor, src_rank))
            self.received_bytes += dest_tensor.nbytes

    def submit_send(self, src_tensor: Tensor, dest_rank: int) -> None:
        """Not called: the plan numbers its messages."""
        raise NotImplementedError

    def submit_recv(self, dest_tensor: Tensor, src_rank: int) -> None:
        """Not called: the plan numbers its messages."""
        raise NotImplementedError

    def run(self) -> None:
        """Carry all of it out."""
        for task_id, target in self._local_targets.items():
            target.copy_(self._local_sources[task_id])
        if self._messages:
            for work in dist.batch_isend_irecv(self._messages):
                work.wait()
