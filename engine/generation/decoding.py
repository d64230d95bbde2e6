"""What a network keeps from one rollout to the next: CUDA graphs, and the addresses they read.

A graph holds raw pointers to weights, cache and its own tensors, and the numbers that kernels were
launched with. It is replayed only while all of them are what they were.
"""

from engine.generation.cache import CacheShape, num_lanes
from engine.generation.cache_memory import CacheMemory, PassingMemory, cache_memory
from engine.generation.draws import Draws, DrawSettings
from engine.generation.graphs import CudaGraph, Record, StepGraph
from engine.network import Network
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

    def open(
        self, network: Network, shape: CacheShape, settings: DrawSettings, seed: int
    ) -> tuple[PagedCache, Draws]:
        """Take memory for a rollout's cache; graphs whose weights, cache or settings are no longer
        what they were recorded with go."""
        cache = shape.build(self.memory.take(shape.num_blocks * shape.block_bytes))
        self.is_open = True
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
            self.is_open = False
            self.memory.give_back()


def decoding_of(network: Network) -> Decoding:
    """Return the network's decoding, made when it is first asked for; while it is open, another
    with memory for one rollout."""
    device, lanes = network.parallel.device, num_lanes(network)
    record = CudaGraph if device.type == "cuda" else None
    if network.decoding is None:
        network.decoding = Decoding(cache_memory(device, num_lanes=lanes), record)
    if network.decoding.is_open:
        return Decoding(PassingMemory(device, num_lanes=lanes), network.decoding.record)
    return network.decoding


def _addresses(network: Network, cache: PagedCache) -> tuple[int, ...]:
    weights = (p.data_ptr() for module in network.modules for p in module.parameters())
    return (*weights, *cache.addresses)
