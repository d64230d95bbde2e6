"""Measures how the kernels that read rows of a vocabulary are best launched on this GPU.

    python -m benchmarks.tune_kernels --device cuda --out benchmarks/results
    python -m benchmarks.tune_kernels --device cpu        # that it works, in seconds

Every candidate is first checked against fp64 on a few rows, then timed on [rows, vocab]. Its
launches go back to back, so that the host is not in the way. The share is that of a copy's
bandwidth in the same process. What wins goes by hand into the table of kernels/launch.py.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.command_line import command, count, mistakes_in_one_line, seconds
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, copy_bandwidth, machine, records_path
from kernels.full_kl import full_kl
from kernels.launch import LAUNCHES, LaunchConfig, architecture, config_for, interpreting
from kernels.logprobs import logprobs
from kernels.row_gradient import row_gradient
from kernels.row_pass import row_pass
from kernels.row_state import RowSpec, empty_results, write_row_results

CANDIDATES = {
    "row_state": [(4096, 8, 1), (4096, 8, 3), (2048, 4, 1), (2048, 4, 4), (8192, 8, 1),
                  (8192, 16, 1), (8192, 16, 2)],
    "row_gradient": [(4096, 8, 1), (4096, 8, 3), (2048, 4, 1), (2048, 4, 4), (2048, 8, 1),
                     (8192, 16, 1), (4096, 16, 1)],
    "row_pass": [(16384, 32, 1), (8192, 32, 1), (8192, 16, 1), (16384, 16, 1), (4096, 16, 1),
                 (4096, 8, 1)],
    "kl_state": [(2048, 8, 1), (4096, 8, 1), (2048, 4, 3)],
    "kl_gradient": [(2048, 8, 1), (4096, 8, 1), (2048, 4, 3)],
}  # fmt: skip
"""Block, warps and stages; the first of each kernel is the one that any other has to beat."""
CANDIDATES_ON_CPU = [(64, 1, 1), (128, 1, 2)]
NUM_CHECKED = 8
TOLERANCE = 2e-4
"""Of what is in fp32, relative to its largest number; what is rounded may add that rounding."""


@dataclass(frozen=True)
class Case:
    """One kernel on given tensors."""

    kernel: str
    what: str
    run: Callable[[], object]
    num_bytes: int
    """Least bytes to read and write."""
    error: Callable[[], float]
    """Largest error on fresh rows over the largest exact number."""
    tolerance: float


def _rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).mul_(4)


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def _state_case(logits: Tensor, labels: Tensor) -> Case:
    spec = RowSpec(num_valid_vocab=logits.shape[1], with_entropy=False)
    results = empty_results(len(logits), logits, with_entropy=False)

    def error() -> float:
        few, y = logits[:NUM_CHECKED], labels[:NUM_CHECKED]
        got = torch.cat(logprobs(few, y, with_entropy=True))
        log_p = few.double().log_softmax(-1)
        entropies = -(log_p.exp() * log_p).sum(-1)
        return _difference(got, torch.cat((log_p.gather(1, y[:, None])[:, 0], entropies)))

    return Case(
        "row_state",
        f"log-probs, {_name(logits)}",
        lambda: write_row_results(results, logits, labels, spec),
        logits.nbytes,
        error,
        TOLERANCE,
    )


def _gradient_case(logits: Tensor, labels: Tensor, *, over: bool) -> Case:
    """Into a tensor of its own, or in bf16 over the fp32 logits as the LM head has it."""
    spec = RowSpec(num_valid_vocab=logits.shape[1], with_entropy=False)
    results = empty_results(len(logits), logits, with_entropy=False)
    write_row_results(results, logits, labels, spec)
    grads = torch.randn(len(logits), device=logits.device), None
    read, out = logits, torch.empty_like(logits)
    if over:  # timed on whatever an earlier run has left there
        read = logits.clone()
        out = read.view(torch.bfloat16)[:, : logits.shape[1]]
    few = slice(0, NUM_CHECKED)

    def error() -> float:
        z, y, g = logits[few], labels[few], grads[0][few]
        base = z.clone()
        mine = base.view(torch.bfloat16)[:, : z.shape[1]] if over else torch.empty_like(z)
        row_gradient(base, y, results.state[few], (g, None), spec, out=mine)
        want = -z.double().softmax(-1)
        want[torch.arange(len(want)), y] += 1
        return _difference(mine, want * g[:, None])

    return Case(
        "row_gradient",
        f"gradient{', bf16 over' if over else ','} {_name(logits)}",
        lambda: row_gradient(read, labels, results.state, grads, spec, out=out),
        logits.nbytes + out.numel() * out.element_size(),
        error,
        TOLERANCE + torch.finfo(out.dtype).eps,
    )


def _pass_case(logits: Tensor, labels: Tensor) -> Case:
    """As the LM head has it, bf16 over the fp32 logits: to beat is the time of the log-probs and
    that of the gradient, one after the other."""
    spec = RowSpec(num_valid_vocab=logits.shape[1], with_entropy=False)
    slope, logprob = torch.tensor(-0.5, device=logits.device), logits.new_empty(len(logits))
    read = logits.clone()
    out = read.view(torch.bfloat16)[:, : logits.shape[1]]

    def error() -> float:
        z, y = logits[:NUM_CHECKED], labels[:NUM_CHECKED]
        base, got = z.clone(), z.new_empty(len(z))
        mine = base.view(torch.bfloat16)[:, : z.shape[1]]
        row_pass(base, y, slope, got, spec, out=mine)
        log_p = z.double().log_softmax(-1)
        want = -log_p.exp()
        want[torch.arange(len(want)), y] += 1
        return _difference(mine, -0.5 * want) + _difference(got, log_p.gather(1, y[:, None])[:, 0])

    return Case(
        "row_pass",
        f"log-probs and gradient, bf16 over {_name(logits)}",
        lambda: row_pass(read, labels, slope, logprob, spec, out=out),
        logits.nbytes + out.numel() * out.element_size(),
        error,
        TOLERANCE + torch.finfo(out.dtype).eps,
    )


def _kl_cases(logits: Tensor, ref_logits: Tensor) -> Iterator[Case]:
    leaf = logits.detach().requires_grad_()
    kl = full_kl(leaf, ref_logits)
    upstream = torch.ones_like(kl)

    def exact() -> tuple[Tensor, Tensor]:
        z = logits[:NUM_CHECKED].double().requires_grad_()
        log_p, log_q = z.log_softmax(-1), ref_logits[:NUM_CHECKED].double().log_softmax(-1)
        want = (log_p.exp() * (log_p - log_q)).sum(-1)
        return want.detach(), torch.autograd.grad(want.sum(), z)[0]

    def gradient() -> Tensor:
        few = logits[:NUM_CHECKED].clone().requires_grad_()
        return torch.autograd.grad(full_kl(few, ref_logits[:NUM_CHECKED]).sum(), few)[0]

    yield Case(
        "kl_state",
        f"KL, {_name(logits)}",
        lambda: full_kl(logits, ref_logits),
        2 * logits.nbytes,
        lambda: _difference(full_kl(logits[:NUM_CHECKED], ref_logits[:NUM_CHECKED]), exact()[0]),
        TOLERANCE,
    )
    yield Case(
        "kl_gradient",
        f"KL gradient, {_name(logits)}",
        lambda: torch.autograd.grad(kl, leaf, upstream, retain_graph=True),
        3 * logits.nbytes,
        lambda: _difference(gradient(), exact()[1]),
        TOLERANCE + torch.finfo(logits.dtype).eps,
    )


def _name(logits: Tensor) -> str:
    return str(logits.dtype).removeprefix("torch.")


def _cases(shape: tuple[int, int], device: torch.device, kernels: list[str]) -> Iterator[Case]:
    """Yield the cases of the kernels, most valuable first, a few at a time in memory."""
    labels = torch.randint(0, shape[1], (shape[0],), device=device)
    for dtype in (torch.bfloat16, torch.float32):
        logits = _rows(shape, dtype, device)
        yield _state_case(logits, labels)
        yield _gradient_case(logits, labels, over=False)
        if dtype == torch.float32:
            yield _gradient_case(logits, labels, over=True)
            yield _pass_case(logits, labels)
    if any(name.startswith("kl") for name in kernels):
        yield from _kl_cases(*(_rows(shape, torch.bfloat16, device) for _ in range(2)))


def _milliseconds(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Time of a run, the best of three rounds of `repeats` launched without waiting between."""
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / repeats)
        else:
            begin = time.perf_counter()
            run()
            best = min(best, (time.perf_counter() - begin) * 1e3)
    return best


@contextlib.contextmanager
def _configured(kernel: str, config: LaunchConfig, device: torch.device) -> Iterator[None]:
    """Within it a kernel runs in this configuration on the device's architecture."""
    entries = LAUNCHES.setdefault(architecture(device), {})
    before = entries.get(kernel)
    entries[kernel] = config
    try:
        yield
    finally:
        del entries[kernel]
        if before is not None:
            entries[kernel] = before


def _measure(case: Case, config: LaunchConfig, device: torch.device) -> dict[str, Any]:
    """The record of one candidate."""
    with _configured(case.kernel, config, device):
        try:
            error = case.error()
            is_right = error <= case.tolerance
            milliseconds = _milliseconds(case.run, device, repeats=10) if is_right else None
        except Exception as failure:  # a candidate that does not compile is a result
            return {"status": f"{type(failure).__name__}: {failure}"[:300], "error": None}
    return {
        "status": "right" if is_right else "wrong",
        "error": error,
        "milliseconds": milliseconds,
        "bytes_per_s": None if milliseconds is None else case.num_bytes / milliseconds * 1e3,
    }


@mistakes_in_one_line()
def main() -> None:
    """Measure the candidates of the command line's kernels: a table, and with --out records."""
    arguments = _parse()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    shape = (arguments.rows, arguments.vocab) if on_gpu else (16, 300)
    where = machine(device)
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if not on_gpu:
        path = "Triton's interpreter" if interpreting() else "the torch reference"
        console.print(f"No GPU: {path}, at {shape}; the times say nothing.")
    bandwidth = copy_bandwidth(device)
    table = Table("case", "block, warps, stages", "ms", "GB/s", "of a copy", "error", "status")
    deadline = time.monotonic() + arguments.seconds
    for case in _cases(shape, device, arguments.kernels):
        if case.kernel not in arguments.kernels:
            continue
        now = config_for(case.kernel, shape[1], device)
        candidates = CANDIDATES[case.kernel] if on_gpu else CANDIDATES_ON_CPU
        for config in (LaunchConfig(*numbers) for numbers in candidates):
            if time.monotonic() > deadline:
                break
            record = _measure(case, config, device)
            table.add_row(*_cells(case, config, record, bandwidth, is_now=config == now))
            if arguments.out:
                sizes = {"rows": shape[0], "vocab": shape[1], "copy_bytes_per_s": bandwidth}
                fields = {"benchmark": "tune_kernels", "kernel": case.kernel, "what": case.what}
                append_record(
                    records_path(arguments.out, device),
                    fields | asdict(config) | record | sizes | where,
                )
    print_whole(console, table)
    if time.monotonic() > deadline:
        console.print(f"Out of its {arguments.seconds} s: the candidates not listed did not run.")


def _cells(
    case: Case, config: LaunchConfig, record: dict[str, Any], bandwidth: float, *, is_now: bool
) -> list[str]:
    name = f"{config.block}, {config.num_warps}, {config.num_stages}{' (now)' if is_now else ''}"
    error = "" if record["error"] is None else f"{record['error']:.1e}"
    if record.get("milliseconds") is None:
        return [case.what, name, "", "", "", error, record["status"]]
    rate = record["bytes_per_s"]
    times = [f"{record['milliseconds']:.3f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.1%}"]
    return [case.what, name, *times, error, record["status"]]


def _parse() -> argparse.Namespace:
    parser = command("tune_kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rows", type=count, default=16384)
    parser.add_argument("--vocab", type=count, default=50304)
    parser.add_argument(
        "--seconds", type=seconds, default=60.0, help="begins no candidate after it"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
