"""Compares the kernels with what others ship: one process, the same tensors, taking turns.

    python -m benchmarks.kernels --device cuda --out benchmarks/results
    python -m benchmarks.kernels --device cpu --ops gae sample --quick

A provider is timed as a rival only when it gives the right result; see README.md beside this file.
"""

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernel_suite.decode_attention import DECODE_ATTENTION
from benchmarks.kernel_suite.full_kl import FULL_KL
from benchmarks.kernel_suite.gae import GAE
from benchmarks.kernel_suite.layer_norm import LAYER_NORM
from benchmarks.kernel_suite.linear_logprobs import LINEAR_LOGPROBS, LINEAR_LOSS
from benchmarks.kernel_suite.logprobs import LOGPROBS, LOGPROBS_ENTROPY
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
from benchmarks.kernel_suite.ppo_loss import PPO_LOSS
from benchmarks.kernel_suite.ranking_loss import RANKING_LOSS
from benchmarks.kernel_suite.report import plot, table
from benchmarks.kernel_suite.sample import SAMPLE, SAMPLE_TOP_P
from benchmarks.kernel_suite.yardstick import copy_of
from benchmarks.timing import (
    Call,
    append_record,
    as_cuda_graph,
    device_clock,
    machine,
    num_launches,
    peak_bytes,
    records_path,
    time_calls,
    wall_clock,
)

OPERATIONS = {
    operation.name: operation
    for operation in (
        LOGPROBS,
        LOGPROBS_ENTROPY,
        LINEAR_LOGPROBS,
        LINEAR_LOSS,
        FULL_KL,
        GAE,
        PPO_LOSS,
        RANKING_LOSS,
        SAMPLE,
        SAMPLE_TOP_P,
        LAYER_NORM,
        DECODE_ATTENTION,
    )
}
_SHORT_MS = 0.05
"""Below this a call is timed as a CUDA graph: its launches would take longer than its work."""
_LAUNCH_BOUND_MS = 1.0
"""Below this the wall time is given besides, launches included."""


@dataclass(frozen=True)
class Effort:
    """How many samples, and of how many sizes."""

    min_samples: int
    max_samples: int
    seconds: float
    """Time for all samples of a case, as far as min_samples allows."""
    num_sizes: int | None = None
    """Of each operation; None for all."""


FULL = Effort(min_samples=20, max_samples=100, seconds=3.0)
QUICK = Effort(min_samples=5, max_samples=20, seconds=0.5, num_sizes=1)


@dataclass
class Case:
    """One operation at one size in one mode, and the records of its providers."""

    operation: Operation
    size: Size
    mode: Mode
    inputs: Inputs
    expected: dict[str, Expected]
    device: torch.device
    records: list[dict[str, Any]] = field(default_factory=list)

    def run(self, effort: Effort) -> None:
        """Check every provider, then time those that pass, in turn."""
        torch.compiler.reset()  # torch.compile would give up on a function with too many sizes
        calls = {}
        for provider in self.operation.providers:
            record = self._record(provider.name, is_bound=provider.is_bound)
            call = self._checked(provider, record)
            self.records.append(record)
            if call is not None:
                calls[provider.name] = call
        num_bytes = self.operation.cost(self.inputs, self.mode).num_bytes
        if num_bytes:
            name = "copy of as many bytes"
            calls[name] = copy_of(num_bytes, self.device)
            self.records.append(self._record(name, is_bound=True) | {"status": "timed"})
        self._measure(calls, effort)

    def _record(self, provider: str, *, is_bound: bool) -> dict[str, Any]:
        return {
            "benchmark": "kernels",
            "operation": self.operation.name,
            **self.size,
            "mode": self.mode,
            "trident_path": "triton" if self.device.type == "cuda" else "reference",
            "provider": provider,
            "is_bound": is_bound,
        }

    def _checked(self, provider: Provider, record: dict[str, Any]) -> Call | None:
        """The provider's call if it can be timed; says in the record why not, or how exact it is.

        Whatever a rival raises is its result: the others go on.
        """
        reason = self._not_applicable(provider)
        if reason:
            record |= {"status": "skipped", "reason": reason}
            return None
        try:
            call = bind(self.operation, provider, self.inputs, self.mode)
            found = {} if provider.is_bound else errors(self.expected, call())
        except ImportError as error:
            record |= {"status": "skipped", "reason": _first_line(error)}
            return None
        except Exception as error:
            record |= {
                "status": "failed",
                "reason": f"{type(error).__name__}: {_first_line(error)}",
            }
            _free_memory()
            return None
        is_right = passes(self.expected, found)
        record |= {"status": "timed" if is_right else "wrong", "errors": found}
        return call if is_right else None

    def _not_applicable(self, provider: Provider) -> str | None:
        if self.mode not in provider.modes:
            return f"has no {self.mode}"
        if provider.needs_gpu and self.device.type != "cuda":
            return "needs a GPU"
        return None

    def _measure(self, calls: dict[str, Call], effort: Effort) -> None:
        """Fill in time, peak memory and launches of the calls, which have run once."""
        wall, clock = wall_clock(self.device), device_clock(self.device)
        first = {name: wall(call) for name, call in calls.items()}
        fitting = int(effort.seconds * 1e3 / max(1e-3, sum(first.values())))
        num_samples = min(max(fitting, effort.min_samples), effort.max_samples)
        timings = time_calls(calls, clock, num_samples=num_samples)
        medians = {name: timing.median_ms for name, timing in timings.items()}
        graphs, wall_timings = {}, {}
        if self.device.type == "cuda":
            short = [name for name, ms in medians.items() if ms < _SHORT_MS]
            captured = {name: as_cuda_graph(calls[name]) for name in short}
            graphs = {name: replay for name, replay in captured.items() if replay}
            timings |= time_calls(graphs, clock, num_samples=num_samples)
            bound = {name: calls[name] for name, ms in medians.items() if ms < _LAUNCH_BOUND_MS}
            wall_timings = time_calls(bound, wall, num_samples=num_samples)
        cost = self.operation.cost(self.inputs, self.mode)
        for record in self.records:
            name = record["provider"]
            if name not in calls:
                continue
            record |= timings[name]._asdict()
            seconds = timings[name].median_ms * 1e-3
            record["clock"] = "graph" if name in graphs else "events"
            record["gb_per_s"] = cost.num_bytes / seconds / 1e9
            record["tflops"] = cost.flops / seconds / 1e12
            record["peak_bytes"] = peak_bytes(calls[name], self.device)
            if self.device.type == "cuda":
                record["launches"] = num_launches(calls[name])
                record["wall_ms"] = wall_timings[name].median_ms if name in wall_timings else None
            else:
                record["clock"] = "wall"


def cases(operation: Operation, device: torch.device, num_sizes: int | None) -> Iterator[Case]:
    """Yield every size and mode, with inputs that the modes of a size share."""
    for size in operation.sizes[device.type][:num_sizes]:
        torch.manual_seed(0)
        inputs = operation.inputs(size, device)
        for name in operation.gradients:
            inputs[name].requires_grad_()
        expected = operation.exact(inputs)
        for mode in operation.modes:
            yield Case(operation, size, mode, inputs, expected, device)


def main() -> None:
    """Run the operations of the command line; print a table a case, write records and plots."""
    arguments = _parse()
    # Optional packages announce, as they are imported, which other packages they miss.
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    where = machine(device)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        console.print("No GPU: trident is its reference path here, plain torch without Triton.")
    effort = QUICK if arguments.quick else FULL
    for name in arguments.ops:
        records = []
        for case in cases(OPERATIONS[name], device, effort.num_sizes):
            case.run(effort)
            console.print(table(case.records, name, case.size, case.mode))
            records += case.records
        if arguments.out:
            path = records_path(arguments.out, device)
            for record in records:
                if record["status"] != "skipped":
                    append_record(path, record | where)
            title = f"{name} on {where['device']}, {where['date']}, commit {where['commit']}"
            picture = path.with_suffix("") / f"{name}.png"
            sizes = OPERATIONS[name].sizes[device.type][: effort.num_sizes]
            console.print(f"plot: {plot(records, sizes, title, picture)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--quick", action="store_true", help="one size, few samples")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended) and plots")
    return parser.parse_args()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:160]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
