"""What is done around a capture, with a stand-in for CUDA's; and a capture on a GPU."""

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch

from engine.generation.graphs import CudaGraph


class Capture:
    """Stands for a CUDA graph: notes what it is asked, and in which order."""

    noted: list[str]

    def pool(self) -> str:
        return f"pool of {id(self)}"

    def capture_begin(self, pool: str | None, capture_error_mode: str) -> None:
        self.noted.append(f"begin in {pool}, {capture_error_mode}, gc {gc.isenabled()}")

    def capture_end(self) -> None:
        self.noted.append("end")

    def replay(self) -> None:
        self.noted.append("replay")


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Put the stand-in in CUDA's place; give what it notes."""
    Capture.noted = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("engine.generation.graphs._side_stream", lambda device: Stream())
    was_enabled = gc.isenabled()
    gc.enable()
    yield Capture.noted
    (gc.enable if was_enabled else gc.disable)()


def test_work_is_done_once_before_it_is_captured_and_no_finalizer_runs_meanwhile(noted):
    graph = CudaGraph(lambda: noted.append("work"), None)
    assert noted == ["work", "begin in None, thread_local, gc False", "work", "end"]
    assert gc.isenabled()
    graph.replay()
    assert noted[4:] == ["replay"]


def test_graphs_beside_one_another_share_their_scratch_memory(noted):
    first = CudaGraph(lambda: None, None)
    CudaGraph(lambda: None, first)
    assert noted[2] == f"begin in {first._graph.pool()}, thread_local, gc False"


def test_work_that_fails_in_a_capture_ends_it(noted):
    def work() -> None:
        if noted:
            raise ValueError("in the capture")

    with pytest.raises(ValueError, match="in the capture"):
        CudaGraph(work, None)
    assert noted[-1] == "end"
    assert gc.isenabled()


def test_who_collects_no_garbage_still_does_not_after_a_capture(noted):
    gc.disable()
    CudaGraph(lambda: None, None)
    assert not gc.isenabled()


@pytest.mark.gpu
def test_a_replay_does_the_work_again_on_the_same_tensors():
    x, y = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")

    def work() -> None:
        y.copy_(2 * x + y)

    graph = CudaGraph(work, None)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    y.fill_(1.0)
    graph.replay()
    graph.replay()
    assert y.tolist() == [5.0, 9.0, 13.0]
