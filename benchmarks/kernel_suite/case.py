"""One operation at one size in one mode: checks its providers, then times those that are right."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    bind,
    errors,
    passes,
)
from benchmarks.kernel_suite.yardstick import copy_of
from benchmarks.timing import (
    Call,
    Clock,
    Timing,
    as_cuda_graph,
    device_clock,
    free_memory,
    num_launches,
    peak_bytes,
    tensor_bytes,
    time_calls,
    time_limit,
    wall_clock,
)

_SHORT_MS = 0.05
"""Below this a call is timed as a CUDA graph: its launches would take longer than its work."""
_LAUNCH_BOUND_MS = 1.0
"""Below this the wall time is given besides, launches included."""
_COPY = "copy of as many bytes"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many samples, and of how many sizes."""

    min_samples: int
    max_samples: int
    seconds: float
    """Time for all samples of a case, as far as min_samples allows."""
    num_sizes: int | None = None
    """Of each operation; None for all."""
    provider_seconds: float = math.inf
    """A provider that has not computed once after so long has failed, and one gets no more samples
    whose samples took so long."""


Publish = Callable[[dict[str, Any]], None]
"""Takes a record that is complete."""


@dataclass
class Case:
    """The tensors that all providers share, and the records of what each did with them."""

    operation: Operation
    size: Size
    mode: Mode
    inputs: Inputs
    expected: dict[str, Expected]
    device: torch.device
    records: list[dict[str, Any]] = field(default_factory=list)

    def run(self, effort: Effort, publish: Publish | None = None) -> None:
        """Fill `records`: one a provider, and one of the memory's speed where that is the bound.

        publish gets a copy of the first provider's record, ours, as soon as it alone was timed,
        status "alone": a rival that takes the process down does not take that with it.
        """
        torch.compiler.reset()  # torch.compile gives up on a function with too many sizes
        # Before the checks, so that who runs out of memory does so there.
        clock = device_clock(self.device)
        calls = self._yardsticks()
        fingerprint = self._fingerprint()
        for provider in self.operation.providers:
            record = self._record(provider.name, is_bound=provider.is_bound)
            call = self._check(provider, record, effort)
            if self._fingerprint() != fingerprint:
                record |= {"status": "failed", "reason": "overwrites its inputs"}
                call = None
                self._restore()
            if call is not None:
                calls[provider.name] = call
            if call is not None and publish and provider is self.operation.providers[0]:
                alone = dataclasses.replace(self, records=[dict(record)])
                few = dataclasses.replace(effort, max_samples=effort.min_samples)
                alone._measure({provider.name: call}, clock, few)
                publish(alone.records[0] | {"status": "alone"})
        self._measure(calls, clock, effort)

    def _record(self, provider: str, *, is_bound: bool) -> dict[str, Any]:
        record = {
            "benchmark": "kernels",
            "operation": self.operation.name,
            **self.size,
            "mode": self.mode,
            "trident_path": "triton" if self.device.type == "cuda" else "reference",
            "provider": provider,
            "is_bound": is_bound,
        }
        self.records.append(record)
        return record

    def _yardsticks(self) -> dict[str, Call]:
        num_bytes = self.operation.cost(self.inputs, self.mode).num_bytes
        if not num_bytes:
            return {}
        self._record(_COPY, is_bound=True)["status"] = "timed"
        return {_COPY: copy_of(num_bytes, self.device)}

    def _check(self, provider: Provider, record: dict[str, Any], effort: Effort) -> Call | None:
        """The provider's call if it can be timed; the record says how exact it is, or why not.

        Whatever a rival raises is its result: the others go on.
        """
        reason = self._why_not(provider)
        if reason:
            record |= {"status": "skipped", "reason": reason}
            return None
        started = time.perf_counter()
        try:
            with time_limit(effort.provider_seconds):
                call = bind(self.operation, provider, self.inputs, self.mode)
                results = call()
        except Exception as error:
            cause = _first_cause(error)
            if isinstance(cause, ImportError):
                record |= {"status": "skipped", "reason": _first_line(cause)}
                return None
            reason = f"{type(cause).__name__}: {_first_line(cause)}"
            record |= {"status": "failed", "reason": reason}
            free_memory(self.device)
            return None
        found = {} if provider.is_bound else errors(self.expected, results)
        record["first_call_s"] = time.perf_counter() - started  # errors wait for the device
        record["result_bytes"] = tensor_bytes(results.values())
        is_right = passes(self.expected, found)
        record |= {"status": "timed" if is_right else "wrong", "errors": found}
        return call if is_right else None

    def _why_not(self, provider: Provider) -> str | None:
        if self.mode not in provider.modes:
            return f"has no {self.mode}"
        if provider.needs_gpu and self.device.type != "cuda":
            return "needs a GPU"
        return None

    def _fingerprint(self) -> list[float]:
        tensors = [x for x in self.inputs.values() if isinstance(x, Tensor)]
        return [x.detach().sum(dtype=torch.float64).item() for x in tensors]

    def _restore(self) -> None:
        fresh = make_inputs(self.operation, self.size, self.device)
        for name, tensor in fresh.items():
            if isinstance(tensor, Tensor):
                self.inputs[name].detach().copy_(tensor.detach())

    def _measure(self, calls: dict[str, Call], clock: Clock, effort: Effort) -> None:
        """Add time, peak memory and launches to the records of the calls, which have run once."""
        wall = wall_clock(self.device)
        one_round_ms = sum(wall(call) for call in calls.values())
        num_samples = int(effort.seconds * 1e3 / max(1e-3, one_round_ms))
        num_samples = min(max(num_samples, effort.min_samples), effort.max_samples)
        times = functools.partial(
            time_calls, num_samples=num_samples, seconds=effort.provider_seconds
        )
        timings = times(calls, clock)
        graphs: dict[str, Timing] = {}
        walls: dict[str, Timing] = {}
        if self.device.type == "cuda":
            short = [name for name, timing in timings.items() if timing.median_ms < _SHORT_MS]
            captured = {name: as_cuda_graph(calls[name]) for name in short}
            replays = {name: replay for name, replay in captured.items() if replay}
            graphs = times(replays, clock)
            bound = [name for name, t in timings.items() if t.median_ms < _LAUNCH_BOUND_MS]
            walls = times({name: calls[name] for name in bound}, wall)
        cost = self.operation.cost(self.inputs, self.mode)
        for record in self.records:
            name = record["provider"]
            if name not in calls:
                continue
            timing = graphs.get(name) or timings[name]
            record |= timing._asdict()
            record["clock"] = "graph" if name in graphs else "call"
            record["gb_per_s"] = cost.num_bytes / timing.median_ms / 1e6
            record["tflops"] = cost.flops / timing.median_ms / 1e9
            record["peak_bytes"] = peak_bytes(calls[name], self.device)
            if "result_bytes" in record:
                record["extra_bytes"] = record["peak_bytes"] - record["result_bytes"]
                is_slow = timing.median_ms > 100 * effort.provider_seconds  # a tenth of it
                record["is_repeatable"] = None if is_slow else _is_repeatable(calls[name])
            if self.device.type == "cuda":
                record["launches"] = num_launches(calls[name])
                record["wall_ms"] = walls[name].median_ms if name in walls else None


def cases(
    operation: Operation, device: torch.device, sizes: Sequence[Size], modes: Sequence[Mode]
) -> Iterator[Case]:
    """Yield every size in every one of the operation's modes that is named; the modes of a size
    share inputs."""
    for size in sizes:
        inputs = make_inputs(operation, size, device)
        expected = operation.exact(inputs)
        for mode in [mode for mode in operation.modes if mode in modes]:
            yield Case(operation, size, mode, inputs, expected, device)


def make_inputs(operation: Operation, size: Size, device: torch.device) -> Inputs:
    """The inputs of a size, the same at every call."""
    torch.manual_seed(0)
    inputs = operation.inputs(size, device)
    for name in operation.gradients:
        inputs[name].requires_grad_()
    return inputs


def _is_repeatable(call: Call) -> bool:
    """Whether two runs give the same bits."""
    first, second = call(), call()
    return all(_same_bits(first[name], second[name]) for name in first)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return torch.equal(*as_bytes)


def _first_cause(error: BaseException) -> BaseException:
    """What an error was raised from: packages that import lazily wrap a missing module."""
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:160]
