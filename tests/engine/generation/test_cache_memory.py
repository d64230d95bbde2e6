import gc
from pathlib import Path

import torch

from engine.generation.cache_memory import cache_memory


def mapped_bytes() -> int:
    """What this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def test_lanes_on_the_cpu_are_apart_and_end_with_their_tensors():
    memory = cache_memory(torch.device("cpu"), num_lanes=3)
    before = mapped_bytes()
    lanes = memory.take(2**28)
    assert [lane.shape for lane in lanes] == [(2**28,)] * 3
    assert mapped_bytes() - before >= 3 * 2**28
    for number, lane in enumerate(lanes):
        lane[:5], lane[-5:] = number + 1, number + 1
    assert [(int(lane[0]), int(lane[-1])) for lane in lanes] == [(1, 1), (2, 2), (3, 3)]
    last = lanes[2]
    del lane, lanes
    gc.collect()
    assert int(last[-1]) == 3  # a tensor keeps what it lies in
    del last
    gc.collect()
    assert mapped_bytes() - before < 2**28
