"""Copies a network's weights into another parallel layout of the same ranks, for generation.

A pipeline generates slowly: every token passes all stages. Refit gives the same ranks a second
network of more tensor or data parallelism, filled by megatron-core's resharding plan. The copy
carries the version of the weights that it was made from, and generate() refuses one that is stale.
"""

import bisect
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding import TransferOp, build_centralized_reshard_plan
from torch import Tensor

from engine.device import synchronize
from engine.network import Network, build_network
from engine.parallel import rearranged
from engine.residency.host import allocate, distinct_storages, release
from engine.residency.seat import weights_of
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics

_NEVER_FILLED = -1  # a version that no weights have
_ROUND_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """What one refit cost."""

    received_bytes: int
    """From other ranks, by the rank that received most; what a rank holds already is copied in
    place."""
    seconds: float
    """Of the slowest rank."""


class Refit:
    """A language model's copy in a generation layout. All ranks make it and call it together."""

    def __init__(self, source: Network, layout: ParallelLayout, *, numerics: Numerics) -> None:
        """numerics: of the source. Raises UserError for a layout that refit cannot fill."""
        source.parallel.layout.check_refit(layout)
        layout.check(source.size)
        self.source = source
        parallel = rearranged(source.parallel, layout)
        self.network = build_network("language", source.size, parallel, numerics=numerics)
        self.network.source = source
        self.report: RefitReport | None = None
        """Of the last refit."""
        (self._target,) = self.network.modules
        self._rounds = _rounds(_plan(source, self._target), self._target)
        self._storages = distinct_storages(weights_of(self.network))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self.release()

    @property
    def num_bytes(self) -> int:
        """The device memory that the copy takes now."""
        return sum(storage.nbytes() for storage in self._storages)

    @contextlib.contextmanager
    def filled(self) -> Iterator[Network]:
        """Run a block with the copy up to date, and give its memory up after it."""
        try:
            self()
            yield self.network
        finally:
            self.release()

    @torch.no_grad()
    def __call__(self) -> RefitReport:
        """Bring the copy up to date."""
        device = self.source.parallel.device
        synchronize(device)
        started = time.perf_counter()
        self.source.settle()
        if self.num_bytes == 0:
            allocate(self._storages, self._sizes)
        sources = dict(_whole(self.source.modules).named_parameters())
        targets = dict(self._target.named_parameters())
        num_received = sum(_exchange(round_, sources, targets) for round_ in self._rounds)
        synchronize(device)
        self.network.weights_version = self.source.weights_version
        seconds = time.perf_counter() - started
        cost = torch.tensor([seconds, num_received], dtype=torch.float64, device=device)
        dist.all_reduce(cost, op=dist.ReduceOp.MAX)
        self.report = RefitReport(seconds=float(cost[0]), received_bytes=int(cost[1]))  # sync
        return self.report

    def release(self) -> None:
        """Give up the copy's memory; it is stale until the next refit."""
        release(self._storages)
        self.network.weights_version = _NEVER_FILLED


@dataclass(kw_only=True)
class _Round:
    """What this rank sends and receives at one time: megatron's operations, in its order."""

    sends: list[TransferOp] = field(default_factory=list)
    receives: list[TransferOp] = field(default_factory=list)


def _whole(chunks: list[Any]) -> torch.nn.Module:
    """Return a stage's chunks as one module, which megatron's plan can take; it shares their
    parameters. Layers are known by their number in the model."""
    if len(chunks) == 1:
        return chunks[0]
    whole, decoder = torch.nn.Module(), torch.nn.Module()
    for name in ("config", "pg_collection"):
        setattr(whole, name, getattr(chunks[0], name))
    for chunk in chunks:
        for name, part in chunk.named_children():
            if name != "decoder":
                whole.add_module(name, part)
        if chunk.decoder.final_layernorm is not None:
            decoder.add_module("final_layernorm", chunk.decoder.final_layernorm)
    decoder.add_module("layers", torch.nn.ModuleList(x for c in chunks for x in c.decoder.layers))
    whole.add_module("decoder", decoder)
    return whole


def _plan(source: Network, target: torch.nn.Module) -> _Round:
    """Return what this rank sends and receives by megatron's plan, with the senders spread.

    megatron lets one data-parallel replica send to all. Here a rank takes what it holds itself, and
    ranks that do not hold a part ask the replicas in turn.
    """
    plan = build_centralized_reshard_plan(_whole(source.modules), target)
    rank, replicas = dist.get_rank(), source.parallel.replica_group
    holders: list[list[int]] = [[]] * dist.get_world_size()  # by rank: who holds the same part
    dist.all_gather_object(holders, dist.get_process_group_ranks(replicas))
    sends: list[list[TransferOp]] = [[]] * replicas.size()
    dist.all_gather_object(sends, plan.send_ops, group=replicas)

    def sender(planned: int, receiver: int) -> int:
        group = holders[planned]
        return receiver if receiver in group else group[receiver % len(group)]

    return _Round(
        sends=sorted(
            (op for ops in sends for op in ops if sender(rank, op.peer_rank) == rank),
            key=lambda op: op.task_id,
        ),
        receives=[replace(op, peer_rank=sender(op.peer_rank, rank)) for op in plan.recv_ops],
    )


def _rounds(plan: _Round, target: torch.nn.Module) -> list[_Round]:
    """Return a plan cut so that a rank receives at most _ROUND_BYTES a round, or one tensor: what
    comes and goes on the way takes no more memory than that."""
    parameters = dict(target.named_parameters())
    firsts: list[int] = []  # the first task of each round of mine; the plan numbers all ranks'
    num_bytes = _ROUND_BYTES
    for op in plan.receives:
        part = parameters[op.param_name].data[op.my_slice]
        if num_bytes + part.nbytes > _ROUND_BYTES:
            firsts.append(op.task_id)
            num_bytes = 0
        num_bytes += part.nbytes
    firsts_of: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(firsts_of, firsts)
    rounds = [_Round() for _ in range(max(map(len, firsts_of)))]
    for op in plan.receives:
        rounds[bisect.bisect_right(firsts, op.task_id) - 1].receives.append(op)
    for op in plan.sends:
        rounds[bisect.bisect_right(firsts_of[op.peer_rank], op.task_id) - 1].sends.append(op)
    return rounds


def _exchange(round_: _Round, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> int:
    """Carry out a round, and return the bytes that came from other ranks.

    Both sides of a pair have their messages in the order of the plan, so they match without tags.
    """
    messages: list[dist.P2POp] = []
    mine: dict[int, Tensor] = {}  # what this rank gives itself, by task
    arriving: list[tuple[Tensor, Tensor]] = []
    for op in round_.sends:
        part = sources[op.param_name].data[op.my_slice]
        if op.peer_rank == dist.get_rank():
            mine[op.task_id] = part
        else:
            messages.append(dist.P2POp(dist.isend, part.contiguous(), op.peer_rank))
    for op in round_.receives:
        part = targets[op.param_name].data[op.my_slice]
        if op.peer_rank == dist.get_rank():
            part.copy_(mine[op.task_id])
        else:
            message = part.contiguous()  # itself, where it is
            messages.append(dist.P2POp(dist.irecv, message, op.peer_rank))
            arriving.append((part, message))
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
    for part, message in arriving:
        if part is not message:
            part.copy_(message)
    return sum(message.nbytes for _, message in arriving)
