"""Decoding steps as CUDA graphs: what is recorded once and launched as one.

On an H100 they decode what eager steps do, token for token (benchmarks.generation's decode). Graphs
with collectives in them, of tensor parallelism, have run on no GPU yet.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Recorded(Protocol):
    """Work on the device that can be done again, on the same tensors."""

    def replay(self) -> None:
        """Do it again."""


Record = Callable[[Callable[[], None], "Recorded | None"], Recorded]
"""Records work, next to what was recorded before: the two share their scratch memory."""


class CudaGraph:
    """Work recorded as a CUDA graph."""

    def __init__(self, work: Callable[[], None], beside: "Recorded | None") -> None:
        """Run the work once, record it; what it reads and writes has to stay where it is.

        torch.cuda.graph would wait for the device, collect garbage and empty both of torch's memory
        caches first, for every graph. None of it is needed: capturing runs nothing, and on a stream
        of its own it leaves queued work alone.
        """
        self._graph = torch.cuda.CUDAGraph()
        # One pool: no graph's scratch memory outlives its replay.
        pool = beside._graph.pool() if isinstance(beside, CudaGraph) else None
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        is_collecting = gc.isenabled()
        with torch.cuda.stream(stream):
            # The first run compiles kernels, loads them and opens connections, which a capture
            # must not.
            work()
            gc.disable()  # a finalizer may call what a capture forbids
            try:
                # thread_local: what other threads ask the device meanwhile does not spoil it.
                self._graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    self._graph.capture_end()
            finally:
                if is_collecting:
                    gc.enable()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: torch keeps memory for every stream apart."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGraph:
    """The recorded work of one pipeline chunk on a decoding step of a fixed number of rows."""

    recorded: Recorded
    inputs: list[Tensor]
    """The step's tensors, in the order of StepTensors.buffers; without pipeline it advances them to
    the next step itself."""
    hidden: Tensor | None
    """[R, 1, hidden size] where it takes another chunk's output."""
    output: Tensor | None
    """[R, 1, hidden size] where it has one."""
    sampled: Tensor
    """[2, R] int32, of the last chunk."""
