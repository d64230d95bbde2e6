"""Copies a network's weights into another parallel layout of the same ranks, for generation.

A pipeline generates slowly: every token passes all stages. Refit gives the same ranks a second
network of more tensor or data parallelism, filled by the plan of engine/residency/resharding.py.
The copy carries the version of the weights that it was made from, and generate() refuses one that
is stale.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.device import synchronize
from engine.ranks.start import rearranged
from engine.residency.host import allocate, distinct_storages, release
from engine.residency.resharding import Resharding, Round, WholeTensor
from engine.residency.seat import weights_of
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network

_ROUND_BYTES = 2**28
_LAYERS = "decoder.layers."


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
        self.network.become_copy(source)
        self.report: RefitReport | None = None
        """Of the last refit."""
        resharding = Resharding(
            source=source.parallel.layout,
            target=layout,
            world_size=parallel.world_size,
            round_bytes=_ROUND_BYTES,
        )
        self._rounds = _plan(resharding, source, self.network)
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
        sources = by_model_name(self.source.modules)
        targets = by_model_name(self.network.modules)
        num_received = sum(_exchange(round_, sources, targets) for round_ in self._rounds)
        synchronize(device)
        self.network.mark_copied()
        seconds = time.perf_counter() - started
        cost = torch.tensor([seconds, num_received], dtype=torch.float64, device=device)
        dist.all_reduce(cost, op=dist.ReduceOp.MAX)
        self.report = RefitReport(seconds=float(cost[0]), received_bytes=int(cost[1]))  # sync
        return self.report

    def release(self) -> None:
        """Give up the copy's memory; it is stale until the next refit."""
        release(self._storages)
        self.network.mark_emptied()


def by_model_name(modules: Iterable[Any]) -> dict[str, Tensor]:
    """Return the parameters of a rank's chunks, with layers numbered as in the whole model."""
    found: dict[str, Tensor] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            words = name.split(".")
            if name.startswith(_LAYERS):
                words[2] = str(module.decoder.layers[int(words[2])].layer_number - 1)
            found[".".join(words)] = parameter
    return found


def whole_tensors(target: Mapping[str, Tensor], resharding: Resharding) -> list[WholeTensor]:
    """Return the network's tensors by a rank's shares of them in the target, which has all."""
    num_layers = len({name.split(".")[2] for name in target if name.startswith(_LAYERS)})
    last = resharding.source.pp - 1
    found = []
    for name, parameter in target.items():
        stage = 0 if name.startswith("embedding.") else last
        if name.startswith(_LAYERS):
            stage = resharding.stage_of_layer(int(name.split(".")[2]), num_layers)
        cut, shape = None, list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            cut = int(parameter.partition_dim)  # type: ignore[attr-defined]
            shape[cut] *= resharding.target.tp
        found.append(
            WholeTensor(
                name=name,
                shape=tuple(shape),
                cut=cut,
                stage=stage,
                element_bytes=parameter.element_size(),
            )
        )
    return found


def _plan(resharding: Resharding, source: Network, target: Network) -> list[Round]:
    """Return this rank's messages. Raises RuntimeError where megatron has cut the source in another
    way than the plan counts on."""
    tensors = whole_tensors(by_model_name(target.modules), resharding)
    here = {
        tensor.name: resharding.share(tensor, resharding.source)
        for tensor in tensors
        if tensor.stage == source.parallel.pp_rank
    }
    found = {name: tuple(p.shape) for name, p in by_model_name(source.modules).items()}
    if source.size.form.is_tied:
        found.pop("output_layer.weight", None)  # the last stage's copy of the embedding
    if found != here:
        names = [name for name in found | here if found.get(name) != here.get(name)]
        raise RuntimeError(f"refit expects other parameters on this rank: {names}")
    return resharding.rounds(tensors, source.parallel.rank)


def _exchange(round_: Round, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> int:
    """Carry out a round, and return the bytes that came from other ranks."""
    messages: list[dist.P2POp] = []
    arriving: list[tuple[Tensor, Tensor]] = []
    for each in round_.sends:
        part = sources[each.name].data[each.source_slices]
        messages.append(dist.P2POp(dist.isend, part.contiguous(), each.peer))
    for each in round_.receives:
        part = targets[each.name].data[each.target_slices]
        if each.peer == dist.get_rank():
            part.copy_(sources[each.name].data[each.source_slices])
        else:
            message = part.contiguous()  # itself, where it is
            messages.append(dist.P2POp(dist.irecv, message, each.peer))
            arriving.append((part, message))
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
    for part, message in arriving:
        if part is not message:
            part.copy_(message)
    return sum(message.nbytes for _, message in arriving)
