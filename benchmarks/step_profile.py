"""Where the time of a call goes: its GPU kernels by kind, the longest of them, and the idle time.

On a GPU the time is that between the start of the first kernel and the end of the last, and idle is
what no kernel, copy or fill covers. On a CPU the operators' own times stand for kernels'.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Call, profiled, silent_stderr

NUM_SHOWN = 25
# The first pattern that a kernel's name holds decides. Products of the head count as "gemm".
KINDS = {
    "collective": r"nccl",
    "attention": r"flash|fmha|attention|attn|_split_kernel|_merge_kernel",
    "head": r"_row_state|_row_gradient|_logit|_kl_|log_softmax|softmax|nll_loss|cross_entropy",
    "gemm": r"gemm|nvjet|cutlass|xmma|cublas|splitk|wgrad|::mm|::addmm|::bmm|::linear|matmul",
    "norm": r"layer_?norm|gammabeta|^_forward_kernel|^_backward_kernel|^_means_kernel",
    "optimizer": r"multi_tensor|adam|lerp|foreach",
    "copy": r"memcpy|memset|copy|::to$|::fill|::zero",
    "elementwise": r"elementwise|triton_|gelu|reduce|index|embedding|cat|gather|scatter|scan"
    r"|::add|::mul|::sub|::div|::sum|::tanh|::pow|::sqrt",
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Milliseconds of one call."""

    wall_ms: float
    idle_ms: float
    by_kind: dict[str, float]
    """Kernels' times added up, the largest first; "other" is what no pattern knows."""
    kernels: list[tuple[str, float, int]]
    """(name, ms, launches), the longest first."""

    def table(self) -> str:
        """Return kinds, idle time and the longest kernels as text."""
        lines = [f"{self.wall_ms:.3f} ms, {self.idle_ms:.3f} ms of it idle"]
        lines += [
            f"{ms:10.3f} ms {ms / self.wall_ms:6.1%}  {kind}" for kind, ms in self.by_kind.items()
        ]
        lines.append(f"the {NUM_SHOWN} kernels that take longest:")
        lines += [
            f"{ms:10.3f} ms {ms / self.wall_ms:6.1%} {count:6d} x  {name[:140]}"
            for name, ms, count in self.kernels[:NUM_SHOWN]
        ]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Return the profile as a record's fields."""
        return {
            "wall_ms": self.wall_ms,
            "idle_ms": self.idle_ms,
            "kinds_ms": self.by_kind,
            "kernels": [[name[:140], ms, n] for name, ms, n in self.kernels[:NUM_SHOWN]],
        }


def kind_of(name: str) -> str:
    """Return what a kernel is for, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), "other")


def profile_call(call: Call, device: torch.device) -> Profile:
    """Run a call that has run before under torch's profiler."""
    if device.type != "cuda":
        return _profile_operators(call)
    with profiled(call, ProfilerActivity.CUDA) as events:
        spans = [
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in events
            if event.device_type() == torch.autograd.DeviceType.CUDA
        ]
    return profile_of(spans)


def profile_of(spans: list[tuple[int, int, str]]) -> Profile:
    """Return the profile of what ran on a device: (start, end, name), in nanoseconds."""
    spans = sorted(spans)
    busy, covered = 0, spans[0][0]
    for start, end, _ in spans:  # streams overlap: time that two cover counts once
        busy += max(0, end - max(start, covered))
        covered = max(covered, end)
    wall = covered - spans[0][0]
    totals: dict[str, list[int]] = defaultdict(list)
    for start, end, name in spans:
        totals[name].append(end - start)
    kernels = [(name, sum(times) / 1e6, len(times)) for name, times in totals.items()]
    return _summed(kernels, wall / 1e6, (wall - busy) / 1e6)


def _profile_operators(call: Call) -> Profile:
    started = time.perf_counter()
    with silent_stderr(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    wall = (time.perf_counter() - started) * 1e3
    averages = profiler.key_averages()
    kernels = [(row.key, row.self_cpu_time_total / 1e3, row.count) for row in averages]
    return _summed(kernels, wall, max(0.0, wall - sum(ms for _, ms, _ in kernels)))


def _summed(kernels: list[tuple[str, float, int]], wall_ms: float, idle_ms: float) -> Profile:
    by_kind: dict[str, float] = defaultdict(float)
    for name, ms, _ in kernels:
        by_kind[kind_of(name)] += ms
    return Profile(
        wall_ms=wall_ms,
        idle_ms=idle_ms,
        by_kind=dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        kernels=sorted(kernels, key=lambda kernel: -kernel[1]),
    )
