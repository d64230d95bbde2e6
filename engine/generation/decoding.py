"""What a network keeps from one rollout to the next: CUDA graphs, and the addresses they read.

A graph holds raw pointers to weights, cache and its own tensors, and the numbers that kernels were
launched with. It is replayed only while all of them are what they were.
"""

import contextlib

from engine.generation.cache import CacheShape, num_lanes
from engine.generation.cache_memory import CacheMemory, PassingMemory, cache_memory
from engine.generation.draws import Draws, DrawSettings
from engine.generation.graphs import CudaGraph, Record, StepGraph
from engine.training.network import Network
from models.paged_attention import PagedCache

GraphKey = tuple[int, int, int]
"""(virtual stage, rows, width of the block tables)."""


class Decoding:
    """One network's graphs and cache memory, for one generate() at a time."""

    def __init__(self, memory: CacheMemory, record: Record | None) -> None:
        """record: None where decoding runs without graphs."""
        self.memory = memory
        self.record = record
        self.is_open = False
        self.graphs: dict[GraphKey, StepGraph] = {}
        self._draws: Draws | None = None
        self._block_size = 0
        self._addresses: tuple[int, ...] = ()
        self._num_readers = 0
        self._mode = contextlib.ExitStack()

    def open(
        self, network: Network, shape: CacheShape, settings: DrawSettings, seed: int
    ) -> tuple[PagedCache, Draws]:
        """Take memory for a rollout's cache; graphs whose weights, cache or settings are no longer
        what they were recorded with go."""
        lanes = self.memory.take(shape.num_blocks * shape.block_bytes)
        self.is_open = True  # from here on close() has something to give back
        cache = shape.build(lanes)
        if self._draws is None or self._draws.settings != settings:
            self._draws = Draws(settings, network.size, network.parallel)
            self.graphs.clear()
        self._draws.seed.fill_(seed)
        addresses = _addresses(network, cache)
        if (self._block_size, self._addresses) != (shape.block_size, addresses):
            self._block_size, self._addresses = shape.block_size, addresses
            self.graphs.clear()
        return cache, self._draws

    def check(self, network: Network, cache: PagedCache) -> None:
        """Raise RuntimeError where weights or cache have moved since open()."""
        if _addresses(network, cache) != self._addresses:
            raise RuntimeError(
                "the weights moved in memory while responses were being generated: finish or close "
                "the iterator of generate() first"
            )

    def close(self) -> None:
        """Give the cache's memory back; the cache must not be used again."""
        if not self.memory.lasts:
            self.graphs.clear()
        if self.is_open:
            self.memory.give_back()
            self.is_open = False

    def enter(self, network: Network) -> None:
        """Put the network into eval mode, for the first of the iterators that now read it."""
        if self._num_readers == 0:
            self._mode.enter_context(network.evaluating())
        self._num_readers += 1

    def leave(self) -> None:
        """Put the network's mode back, behind the last of them."""
        self._num_readers -= 1
        if self._num_readers == 0:
            self._mode.close()


def decoding_of(network: Network) -> Decoding:
    """Return the network's decoding, made when it is first asked for; while it is open, another
    with memory for one rollout."""
    lasting = lasting_decoding(network)
    if lasting.is_open:
        memory = PassingMemory(network.parallel.device, num_lanes=num_lanes(network))
        return Decoding(memory, lasting.record)
    return lasting


def lasting_decoding(network: Network) -> Decoding:
    """Return what the network keeps over all rollouts, made when it is first asked for."""
    if network.decoding is None:
        device = network.parallel.device
        memory = cache_memory(device, num_lanes=num_lanes(network))
        network.keep(Decoding(memory, CudaGraph if device.type == "cuda" else None))
    return network.decoding


def _addresses(network: Network, cache: PagedCache) -> tuple[int, ...]:
    weights = (p.data_ptr() for module in network.modules for p in module.parameters())
    return (*weights, *cache.addresses)
