"""CUDA graphs' way of decoding on the CPU: steps recorded once and done again, over a cache whose
addresses last."""

from collections.abc import Callable

import torch

from engine.generation.cache import num_lanes
from engine.generation.decoding import Decoding
from engine.training.network import Network


class LastingLanes:
    """Lanes at the same addresses every time; what is given back becomes NaN."""

    lasts = True
    granularity = 64
    last_bytes = 0

    def __init__(self, num_lanes: int) -> None:
        self._lanes = [torch.full((2**20,), 255, dtype=torch.uint8) for _ in range(num_lanes)]
        self.is_taken = False

    def take(self, num_bytes: int) -> list[torch.Tensor]:
        assert not self.is_taken
        self.is_taken = True
        return [lane[:num_bytes] for lane in self._lanes]

    def give_back(self) -> None:
        assert self.is_taken
        self.is_taken = False
        for lane in self._lanes:
            lane.fill_(255)


class DoneAgain:
    """Work that is run where a graph would be replayed, with all it was recorded with."""

    def __init__(self, work: Callable[[], None], beside: object) -> None:
        work()
        self._work = work

    def replay(self) -> None:
        self._work()


def record_steps(network: Network) -> Decoding:
    """Have a network on the CPU generate as one on a GPU does; return what it keeps."""
    network.keep(Decoding(LastingLanes(num_lanes(network)), DoneAgain))
    return network.decoding
