"""A frozen network's weights spread over data-parallel ranks, gathered layer by layer when read."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.parallel import Parallel
from engine.training.network import Network


class ShardedWeights:
    """Keeps 1 / dp of a network's weights on this rank.

    A chunk's forward pass gathers what lies outside of its layers (embeddings, final norm, head)
    for as long as it runs. Of the layers it gathers two at a time: while one computes, the next
    arrives. All data-parallel ranks make the same passes.
    """

    def __init__(self, network: Network, observe: Callable[[], None]) -> None:
        """observe: called whenever device memory was taken."""
        self._bundles: list[_Bundle] = []
        self._observe = observe
        for chunk in network.modules:
            self._shard(chunk, network.parallel)

    @property
    def num_bytes(self) -> int:
        """Device memory taken: this rank's shards, and what is gathered."""
        return sum(bundle.num_bytes for bundle in self._bundles)

    def _shard(self, chunk: Any, parallel: Parallel) -> None:
        layers = list(chunk.decoder.layers)
        inside = {p for layer in layers for p in layer.parameters()}
        outside = [p for p in chunk.parameters() if p not in inside]  # none within a pipeline
        ends = [_Bundle(part, parallel) for part in _by_dtype(outside)]
        bundles = [_Bundle(list(layer.parameters()), parallel) for layer in layers]
        self._bundles += ends + bundles

        def begin_chunk(*_: Any) -> None:
            for bundle in (*ends, bundles[0]):
                bundle.start_gather()
            for bundle in ends:
                bundle.wait()

        def end_chunk(*_: Any) -> None:
            for bundle in ends:
                bundle.drop()

        chunk.register_forward_pre_hook(begin_chunk)
        chunk.register_forward_hook(end_chunk)
        for n, layer in enumerate(layers):
            following = bundles[n + 1] if n + 1 < len(bundles) else None

            def begin_layer(*_: Any, bundle: _Bundle = bundles[n], after: Any = following) -> None:
                bundle.wait()
                if after is not None:  # its memory comes from the layer before this one
                    after.start_gather()
                if bundle is bundles[0]:  # two layers and the ends: the most at once
                    self._observe()

            def end_layer(*_: Any, bundle: _Bundle = bundles[n]) -> None:
                bundle.drop()

            layer.register_forward_pre_hook(begin_layer)
            layer.register_forward_hook(end_layer)


def _by_dtype(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Return the parameters of each dtype: a scalar network's head is fp32."""
    dtypes = dict.fromkeys(p.dtype for p in parameters)
    return [[p for p in parameters if p.dtype is dtype] for dtype in dtypes]


class _Bundle:
    """Parameters of one dtype that are gathered together."""

    def __init__(self, parameters: list[torch.nn.Parameter], parallel: Parallel) -> None:
        self._parameters = parameters
        self._shapes = [p.shape for p in parameters]
        self._group = parallel.dp_group
        self._gathered: Tensor | None = None
        self._work: dist.Work | None = None
        flat = torch.cat([p.detach().flatten() for p in parameters])
        shard_length = math.ceil(len(flat) / parallel.dp)
        flat = torch.nn.functional.pad(flat, (0, shard_length * parallel.dp - len(flat)))
        self._nothing = flat.new_empty(0)
        # [shard_length]: a copy, so that the whole goes.
        self._shard = flat.view(parallel.dp, shard_length)[parallel.dp_rank].clone()
        self._num_gathered = len(flat)
        self.drop()

    @property
    def num_bytes(self) -> int:
        gathered = 0 if self._gathered is None else self._gathered.nbytes
        return self._shard.nbytes + gathered

    def start_gather(self) -> None:
        """Start collecting the whole from all data-parallel ranks."""
        self._gathered = self._shard.new_empty(self._num_gathered)
        # Bytes: gloo lacks some of the dtypes.
        self._work = dist.all_gather_into_tensor(
            self._gathered.view(torch.uint8),
            self._shard.view(torch.uint8),
            group=self._group,
            async_op=True,
        )

    def wait(self) -> None:
        """Let the computation wait for the whole, and point the parameters into it."""
        assert self._work is not None and self._gathered is not None
        self._work.wait()
        start = 0
        for parameter, shape in zip(self._parameters, self._shapes, strict=True):
            parameter.data = self._gathered[start : start + shape.numel()].view(shape)
            start += shape.numel()

    def drop(self) -> None:
        """Give the whole up; the computation that was told so far still reads it."""
        for parameter in self._parameters:
            parameter.data = self._nothing
        self._gathered = self._work = None
