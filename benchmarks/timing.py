"""What a call costs: milliseconds, peak memory and launches, and the machine it was measured on.

Calls that are compared take turns (A B A B ...), so that a drift of the clocks meets all of them
alike. On a GPU the second-level cache is cold at the start of every sample.
"""

import contextlib
import gc
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.records import append_line

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Runs a call once and returns its milliseconds."""


_WAITS = {
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
}


class Timing(NamedTuple):
    """Milliseconds of one call over its samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int


def time_calls(
    calls: Mapping[str, Call], clock: Clock, *, num_samples: int = 20, seconds: float = math.inf
) -> dict[str, Timing]:
    """Time calls that have run before, one sample of each in turn. A call whose samples have taken
    so many seconds already gets no more; one it always has."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_samples):
        for name, call in calls.items():
            if not samples[name] or sum(samples[name]) < seconds * 1e3:
                samples[name].append(clock(call))
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: list[float]) -> Timing:
    """Return median and outer fifths of milliseconds, one at least."""
    if len(samples) == 1:
        return Timing(*samples * 3, 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples))


def wall_clock(device: torch.device) -> Clock:
    """Host time from the call to the end of its work on the device, its launches included."""

    def clock(call: Call) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    return clock


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Run a block that raises TimeoutError after so many seconds, in the main thread of a process;
    elsewhere, or without a limit, it takes what it takes.

    Code that waits within a library hears of it when it comes back to Python.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or math.isinf(seconds):
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def device_clock(device: torch.device) -> Clock:
    """Time on the GPU between events, its L2 cache cold; on a CPU the wall clock.

    The flush of the cache is still running while the host launches the call. That hides the
    launches of a short call, as a training step does.
    """
    if device.type != "cuda":
        return wall_clock(device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Call) -> float:
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()  # sync
        return start.elapsed_time(end)

    return clock


def as_cuda_graph(call: Call) -> Call | None:
    """Replay of the call captured as a CUDA graph, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            call()  # what is allocated or initialised on a first run on this stream
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the device, or copies to the host
        torch.cuda.synchronize()
        return None
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory the call holds at once beyond what it found, its results included; see
    watched_memory."""
    with watched_memory(device) as peak:
        result = call()  # alive to the end: the memory of a result counts
    del result
    return peak[0]


@contextlib.contextmanager
def watched_memory(device: torch.device) -> Iterator[list[int]]:
    """Run a block; the list has afterwards the most bytes it held at once beyond what it found.

    On a CPU this is what torch's allocator gave out; scratch space within a library is not seen.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with (
        silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        yield peak
    events = profiler.profiler.kineto_results.events()
    held = 0
    for _, num_bytes in sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    ):
        held += num_bytes
        peak[0] = max(peak[0], held)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def num_launches(call: Call) -> int:
    """Kernels, copies and fills that the call starts on the GPU."""
    with profiled(call, ProfilerActivity.CUDA) as events:
        return sum(e.device_type() == torch.autograd.DeviceType.CUDA for e in events)


def num_host_syncs(call: Call) -> int:
    """Times that the host waits for the GPU in a call: for a stream, an event, a copy."""

    def count(call: Call) -> int:
        with profiled(call, ProfilerActivity.CUDA) as events:
            return sum(e.name() in _WAITS for e in events)

    return count(call) - count(lambda: None)  # the profiler waits too


@contextlib.contextmanager
def profiled(call: Call, activity: ProfilerActivity) -> Iterator[list[Any]]:
    """Yield the profiler's raw events of one call."""
    on_gpu = activity == ProfilerActivity.CUDA
    with silent_stderr(), profile(activities=[activity], profile_memory=not on_gpu) as profiler:
        result = call()  # alive to the end: the memory of a result counts
        if on_gpu:
            torch.cuda.synchronize()
    del result
    yield profiler.profiler.kineto_results.events()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what native code prints: the profiler announces each start and stop."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product at its fastest, the most a network can hope for."""
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return 2 * width**3 / _fastest_seconds(lambda: torch.mm(a, b), device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy within the device's memory moves at its fastest: those it reads and those
    it writes."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest_seconds(lambda: target.copy_(source), device)


def _fastest_seconds(call: Call, device: torch.device, num_samples: int = 20) -> float:
    clock = wall_clock(device)
    call()
    return min(clock(call) for _ in range(num_samples)) / 1e3


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' memory; what several of them share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def machine(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a measurement is only comparable under: device, driver, versions, commit, date.

    dtype: of the networks that are measured, where there are any, for what computes their
    attention.
    """
    fields: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        query = ("--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
        answer = _output_of("nvidia-smi", *query, f"--id={device.index or 0}")
        driver, _, clock = (answer or "unknown, unknown").partition(", ")
        fields |= {"driver": driver, "max_clock": clock, "cuda": torch.version.cuda}
    else:
        fields["threads"] = torch.get_num_threads()
    fields["torch"] = torch.__version__  # with its build, +cpu or +cu130, which a package lacks
    fields |= {name: _version(name) for name in ("triton", "megatron-core")}
    if dtype is not None:
        from models.attention import attention_backend  # brings megatron, not for every benchmark

        fields["attention"] = attention_backend(device, dtype)
        fields["flash-attn-4"] = _version("flash-attn-4")
    fields["python"] = platform.python_version()
    fields["commit"] = _commit()
    fields["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return fields


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if models:
            return models[0].strip()
    return platform.processor() or platform.machine()


def records_path(folder: Path, device: torch.device) -> Path:
    """The file that a device's records go to: nvidia-h200.jsonl; cpu.jsonl for any CPU."""
    if device.type != "cuda":
        return folder / "cpu.jsonl"
    return folder / f"{re.sub('[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.jsonl"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line, one measurement."""
    append_line(path, json.dumps(record))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the working tree, marked where files differ from it.

    A tree that was copied without its history is told its commit by TRIDENT_COMMIT.
    """
    if told := os.environ.get("TRIDENT_COMMIT"):
        return told
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    is_changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and is_changed else commit


def _output_of(*command: str) -> str | None:
    """First line that a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
