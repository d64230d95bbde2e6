"""Where the time of a call goes: its GPU kernels by kind, the longest of them, and the idle time.

On a GPU the time is that between the start of the first kernel and the end of the last. Idle is
what no kernel, copy or fill covers. On a CPU kernels are torch's operators, each with its own time
without that of the operators it calls. Idle is what lies outside all of them: Python, and
autograd's engine.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import Call, profiled, silent_stderr

NUM_SHOWN = 25
# The first pattern that a kernel's name holds decides. Products of the head count as "gemm".
KINDS = {
    "collective": r"nccl|c10d::",
    "attention": r"flash|fmha|attention|attn|_split_kernel|_merge_kernel",
    "head": r"_row_state|_row_gradient|_logit|_kl_|log_softmax|softmax|nll_loss|cross_entropy",
    "gemm": r"gemm|nvjet|cutlass|xmma|cublas|splitk|wgrad|matmul|mkldnn"
    r"|::(mm|addmm|addmm_|bmm|baddbmm|linear|mv|dot)$",
    "norm": r"layer_?norm|gammabeta|^_forward_kernel|^_backward_kernel|^_means_kernel",
    "optimizer": r"multi_tensor|adam|lerp|foreach|vector_norm",
    "gather": r"index|gather|scatter|embedding|catarray|::cat$|::stack$|::repeat_interleave",
    "copy": r"memcpy|memset|copy|::to$|::fill|::zero|::clone|::contiguous",
    "view": r"::(_?reshape|_?unsafe_view|as_strided|view|select$|slice|transpose|t$|expand|permute"
    r"|unsqueeze|squeeze|narrow|split|chunk|unbind|unflatten|detach|alias|resize|set_|empty|item"
    r"|_local_scalar)",  # views, allocations, numbers for the host: of a CPU's operators only
    # And the reductions, and what else torch has.
    "elementwise": r"elementwise|triton_|gelu|reduce|scan|aten::",
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
        spans = _spans(event for event in events if not _is_host(event))
    return profile_of(spans)


def profile_phases(call: Call, device: torch.device, phases: Sequence[str]) -> dict[str, Profile]:
    """Run a call that has run before under torch's profiler; return the profile of each of its
    record_function ranges of these names.

    On a GPU a range's kernels are those that start within it: the device must be idle where one
    begins and ends.
    """
    activities = [ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with silent_stderr(), profile(activities=activities) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    # gloo's threads and autograd's for a GPU work while this one waits.
    thread = next(e.start_thread_id() for e in events if e.name() in phases and _is_host(e))
    on_host = _spans(e for e in events if _is_host(e) and e.start_thread_id() == thread)
    on_device = _spans(e for e in events if not (_is_host(e) or e.is_user_annotation()))
    found = {}
    for first, last, phase in [span for span in on_host if span[2] in phases]:
        within = [span for span in (on_device if on_gpu else on_host) if first <= span[0] < last]
        if on_gpu:
            shown = profile_of(within)
            wall = (last - first) / 1e6
            idle = shown.idle_ms + wall - shown.wall_ms
            found[phase] = dataclasses.replace(shown, wall_ms=wall, idle_ms=idle)
        else:
            found[phase] = profile_of_operators(within)
    return found


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


def profile_of_operators(spans: list[tuple[int, int, str]]) -> Profile:
    """Return the profile of what one thread of the host ran, calls and what they called: (start,
    end, name), in nanoseconds. The whole time is that from the first start to the last end."""
    # Whoever begins first, or at once and lasts longer, has called the other.
    spans = sorted(spans, key=lambda span: (span[0], -span[1]))
    own: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    open_spans: list[tuple[int, str]] = []
    for start, end, name in spans:
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1][1]] -= end - start
        own[name] += end - start
        counts[name] += 1
        open_spans.append((end, name))
    wall = (max(end for _, end, _ in spans) - spans[0][0]) / 1e6
    kernels = [(name, ns / 1e6, counts[name]) for name, ns in own.items() if _computes(name)]
    return _summed(kernels, wall, wall - sum(ms for _, ms, _ in kernels))


def _profile_operators(call: Call) -> Profile:
    whole = "profile_call"

    def named() -> None:
        with record_function(whole):
            call()

    return profile_phases(named, torch.device("cpu"), [whole])[whole]


def _spans(events: Iterable[Any]) -> list[tuple[int, int, str]]:
    return [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events]


def _is_host(event: Any) -> bool:
    return event.device_type() == torch.autograd.DeviceType.CPU


def _computes(name: str) -> bool:
    """Whether an event of the host is an operator: not a range, a Python function, one of ours that
    is Python on a CPU, or a step of autograd's engine."""
    return "::" in name and not re.match(r"autograd::|torch::|trident::", name)


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
