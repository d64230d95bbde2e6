"""Memory that keeps its addresses; all of it needs a GPU, but for what is done where there is
none."""

import ctypes
import gc

import pytest
import torch

from engine.generation import cache_memory as cache_memory_file
from engine.generation import lasting_memory as lasting_memory_file
from engine.generation.cache_memory import PassingMemory, cache_memory
from engine.generation.lasting_memory import LastingMemory, Unsupported, _Access, _Properties

LANE_BYTES = 5 * 2**20 + 3  # no multiple of any granularity


@pytest.fixture
def memory():
    return LastingMemory(torch.device("cuda", 0), num_lanes=4)


def free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(0)[0]


@pytest.mark.gpu
def test_addresses_last_and_memory_comes_and_goes(memory):
    free, found = free_bytes(), []
    for _ in range(3):
        lanes = memory.take(LANE_BYTES)
        found.append([lane.data_ptr() for lane in lanes])
        assert all(lane.shape == (LANE_BYTES,) and lane.dtype == torch.uint8 for lane in lanes)
        for number, lane in enumerate(lanes):
            lane.fill_(number)
        assert [int(lane.sum()) for lane in lanes] == [n * LANE_BYTES for n in range(4)]
        assert memory.num_bytes >= 4 * LANE_BYTES
        assert free - torch.cuda.mem_get_info(0)[0] >= 4 * LANE_BYTES
        del lane, lanes
        memory.give_back()
        assert memory.num_bytes == 0
        assert free_bytes() == free
    assert found[0] == found[1] == found[2]
    assert memory.last_bytes >= 4 * LANE_BYTES


@pytest.mark.gpu
def test_lanes_can_be_larger_the_next_time(memory):
    small = [lane.data_ptr() for lane in memory.take(1)]
    memory.give_back()
    large = memory.take(2**28)
    assert [lane.data_ptr() for lane in large] == small
    large[3][-1] = 7
    assert int(large[3][-1]) == 7
    memory.give_back()


@pytest.mark.gpu
def test_a_graph_captured_over_it_is_right_after_memory_was_taken_again(memory):
    x = torch.zeros(1000, device="cuda")
    (lane, *_) = memory.take(LANE_BYTES)
    y = lane[:4000].view(torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y.add_(x)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        y.add_(x)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    for start in (0.0, 5.0):
        del y, lane
        memory.give_back()
        other = torch.full((2**28,), 3.0, device="cuda")  # who takes the pages meanwhile
        del other
        (lane, *_) = memory.take(LANE_BYTES)
        y = lane[:4000].view(torch.float32)
        y.fill_(start)
        x.fill_(2.0)
        graph.replay()
        graph.replay()
        assert (y == start + 4.0).all()
    del graph
    memory.give_back()


@pytest.mark.gpu
def test_more_than_the_device_has_is_out_of_memory_and_leaves_nothing(memory):
    free = free_bytes()
    for num_bytes in (free // 4 + 2**28, 2**50):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            memory.take(num_bytes)
        assert memory.num_bytes == 0
        assert free_bytes() == free
    memory.take(1)
    memory.give_back()


@pytest.mark.gpu
def test_taking_twice_is_an_error_and_the_first_stays(memory):
    lanes = memory.take(100)
    with pytest.raises(RuntimeError, match="taken already"):
        memory.take(100)
    lanes[0].fill_(1)
    assert int(lanes[0].sum()) == 100
    memory.give_back()


@pytest.mark.gpu
def test_memory_goes_with_its_owner():
    free = free_bytes()
    memory = LastingMemory(torch.device("cuda", 0), num_lanes=2)
    memory.take(2**26)
    assert free - torch.cuda.mem_get_info(0)[0] >= 2**27
    del memory
    gc.collect()
    assert free_bytes() == free


@pytest.mark.gpu
def test_a_refusal_of_the_driver_is_told_in_its_words(memory):
    with pytest.raises(RuntimeError, match=r"cuMemCreate: .*invalid.* \(CUresult 1\)"):
        memory._driver.map(memory._base, 12345)  # no multiple of the granularity


def test_structures_are_those_of_the_driver():
    # cuda.h: CUmemAllocationProp has 32 bytes, CUmemAccessDesc 12.
    offsets = [getattr(_Properties, name).offset for name in ("location", "metadata", "flags")]
    assert offsets == [8, 16, 24]
    assert (ctypes.sizeof(_Properties), ctypes.sizeof(_Access)) == (32, 12)


class Refusing:
    """A driver that keeps books of what is mapped, and has room for two granules."""

    def __init__(self, device: torch.device) -> None:
        self.mapped: dict[int, int] = {}

    def granularity(self) -> int:
        return 100

    def reserve(self, num_bytes: int) -> int:
        self.reserved = num_bytes
        return 10_000

    def free(self, address: int, num_bytes: int) -> None:
        assert not self.mapped

    def map(self, address: int, num_bytes: int) -> None:
        if sum(self.mapped.values()) + num_bytes > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert address not in self.mapped
        self.mapped[address] = num_bytes

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self.mapped.pop(address) == num_bytes


def test_lanes_that_do_not_all_fit_are_all_given_back(monkeypatch):
    properties = type("Properties", (), {"total_memory": 1001})
    monkeypatch.setattr(lasting_memory_file, "_Driver", Refusing)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "as_tensor", lambda lane, device: lane.__cuda_array_interface__)
    memory = LastingMemory(torch.device("cuda", 0), num_lanes=2)
    assert memory._driver.reserved == 2 * 600
    assert [lane["data"][0] for lane in memory.take(99)] == [10_000, 10_600]
    assert memory._driver.mapped == {10_000: 100, 10_600: 100}
    memory.give_back()
    with pytest.raises(torch.OutOfMemoryError):
        memory.take(101)
    assert (memory.num_bytes, memory._driver.mapped, memory.last_bytes) == (0, {}, 200)
    with pytest.raises(torch.OutOfMemoryError, match="2 lanes of 700 bytes"):
        memory.take(601)


def test_a_driver_that_maps_nothing_is_told_and_done_without(monkeypatch):
    def refuse(device: torch.device, *, num_lanes: int) -> None:
        raise Unsupported("cuMemCreate: operation not supported (CUresult 801)")

    monkeypatch.setattr(cache_memory_file, "LastingMemory", refuse)
    with pytest.warns(UserWarning, match=r"CUresult 801.*captured again"):
        memory = cache_memory(torch.device("cuda", 0), num_lanes=4)
    assert isinstance(memory, PassingMemory)
    assert not memory.lasts


def test_a_cpu_has_passing_memory():
    memory = cache_memory(torch.device("cpu"), num_lanes=3)
    assert isinstance(memory, PassingMemory)
    assert [lane.shape for lane in memory.take(10)] == [(10,)] * 3
