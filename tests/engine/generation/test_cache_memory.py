import warnings
import weakref

import pytest
import torch

from engine.generation import cache_memory as file
from engine.generation.cache_memory import PassingMemory, cache_memory
from engine.generation.lasting_memory import Unsupported

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class OfADriver:
    """Stands for lasting memory on a GPU whose driver has it."""

    lasts = True

    def __init__(self, device: torch.device, *, num_lanes: int) -> None:
        self.device, self.num_lanes = device, num_lanes


def test_a_lane_is_as_long_as_was_asked_and_no_two_overlap():
    lanes = PassingMemory(CPU, num_lanes=3).take(100)
    assert [(lane.dtype, lane.shape) for lane in lanes] == [(torch.uint8, (100,))] * 3
    for number, lane in enumerate(lanes):
        lane.fill_(number)
    assert [set(lane.tolist()) for lane in lanes] == [{0}, {1}, {2}]


def test_passing_memory_ends_with_the_last_tensor_over_it():
    memory = PassingMemory(CPU, num_lanes=1)
    (lane,) = memory.take(100)
    view, reference = lane[10:], weakref.ref(lane.untyped_storage())
    memory.give_back()
    del lane
    assert reference() is not None
    del view
    assert reference() is None


def test_on_the_cpu_memory_passes_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = cache_memory(CPU, num_lanes=2)
    assert not memory.lasts
    assert len(memory.take(8)) == 2


def test_on_a_gpu_memory_lasts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file, "LastingMemory", OfADriver)
    memory = cache_memory(GPU, num_lanes=2)
    assert isinstance(memory, OfADriver)
    assert (memory.device, memory.num_lanes) == (GPU, 2)


def test_a_driver_without_lasting_memory_is_told_and_passing_memory_serves(monkeypatch):
    def refuse(device: torch.device, *, num_lanes: int) -> None:
        raise Unsupported("an old driver")

    monkeypatch.setattr(file, "LastingMemory", refuse)
    with pytest.warns(UserWarning, match=r"\(an old driver\): CUDA graphs are captured again"):
        memory = cache_memory(GPU, num_lanes=2)
    assert isinstance(memory, PassingMemory)
