"""Does a kernel compile, and is it right: one operation at an odd and at a real size against fp64.

    python -m benchmarks.gpu.kernel_checks --operation gae --device cuda --out DIR

The cases are the benchmark suite's; nothing is timed. Outputs of a run are poisoned before it: the
allocator hands out memory full of NaN. Every record is on disk before the next case begins, "begun"
before the kernel runs, so that an illegal access is seen at its case.
"""

import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.command_line import command, mistakes_in_one_line
from benchmarks.kernel_suite.case import make_inputs
from benchmarks.kernel_suite.operation import Mode, Operation, Size, bind, errors, passes
from benchmarks.kernels import OPERATIONS
from benchmarks.timing import append_record, machine, records_path

ODD: dict[str, Size] = {
    "logprobs": {"tokens": 77, "vocab": 50257},
    "logprobs_entropy": {"tokens": 77, "vocab": 50257},
    "linear_logprobs": {"tokens": 1037, "hidden": 776, "vocab": 50257},
    "linear_loss": {"tokens": 1037, "hidden": 776, "vocab": 50257},
    "full_kl": {"tokens": 77, "vocab": 50257},
    "gae": {"sequences": 7, "length": 333},
    "policy_loss": {"tokens": 1037},
    "value_loss": {"tokens": 1037},
    "ranking_loss": {"prompts": 7, "completions": 5},
    "sample": {"rows": 7, "vocab": 50257},
    "sample_top_p": {"rows": 7, "vocab": 50257},
    "layer_norm": {"tokens": 77, "hidden": 1000},
    "gated": {"tokens": 77, "columns": 1003},
    "rotate": {"tokens": 77, "heads": 21, "kv_heads": 3, "dim": 80, "turned": 22},
    "decode_attention": {"sequences": 5, "context": 333, "heads": 3, "block_size": 64},
    "decode_attention_grouped": {
        "sequences": 5,
        "context": 333,
        "heads": 21,
        "block_size": 64,
        "kv_heads": 3,
    },
}
"""Sizes that no power of two divides, as far as the operation allows; by operation."""

Verdict = Literal["begun", "right", "wrong", "does not compile", "fails"]


def check(operation: Operation, size: Size, mode: Mode, device: torch.device) -> dict[str, Any]:
    """Return verdict, seconds of the first run, errors against fp64 or the whole text of the
    first exception."""
    (ours,) = (provider for provider in operation.providers if provider.name == "trident")
    inputs = make_inputs(operation, size, device)
    expected = operation.exact(inputs)
    _poison(device)
    start = time.perf_counter()
    try:
        results = bind(operation, ours, inputs, mode)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, it is the finding
        is_compiler = _is_of_compiler(error)
        return {
            "verdict": "does not compile" if is_compiler else "fails",
            "reason": "".join(traceback.format_exception(error)),
        }
    seconds = time.perf_counter() - start
    found = errors(expected, results)
    verdict: Verdict = "right" if found and passes(expected, found) else "wrong"
    return {
        "verdict": verdict,
        "first_run_s": seconds,
        "errors": found,
        "tolerances": {name: expected[name].tolerance for name in found},
    }


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that is handed out next: an element that nobody writes shows."""
    for num_bytes in (2**10, 2**20, 2**24, 2**27):
        blocks = [torch.full((num_bytes // 4,), torch.nan, device=device) for _ in range(4)]
        del blocks


def _is_of_compiler(error: BaseException | None) -> bool:
    """True where the exception, or one that it was raised from, is Triton's or the compiler's."""
    while error is not None:
        module = type(error).__module__
        if module.startswith("triton") or "ptxas" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@mistakes_in_one_line()
def main() -> None:
    """Check one operation; append a record a case, and exit with 1 where one is not right."""
    parser = command("gpu.kernel_checks")
    parser.add_argument("--operation", choices=OPERATIONS, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    operation, where = OPERATIONS[arguments.operation], machine(device)
    path = records_path(arguments.out, device)
    sizes = {"odd": _odd(operation, device), "real": operation.sizes[device.type][0]}
    is_right = True
    for kind, size in sizes.items():
        for mode in operation.modes:
            case = {"benchmark": "kernel_check", "operation": operation.name, "mode": mode}
            case |= {"size_kind": kind, "size": size}
            append_record(path, case | {"verdict": "begun"} | where)
            record = check(operation, size, mode, device)
            append_record(path, case | record | where)
            is_right &= record["verdict"] == "right"
            print(operation.name, kind, mode, record["verdict"], record.get("errors", ""))
            if "reason" in record:
                print(record["reason"])
    raise SystemExit(not is_right)


def _odd(operation: Operation, device: torch.device) -> Size:
    if device.type == "cuda":
        return ODD[operation.name]
    # The reference path, for a look: as odd, but small.
    small = {"vocab": 997, "tokens": 37, "hidden": 40}
    return {name: min(value, small.get(name, value)) for name, value in ODD[operation.name].items()}


if __name__ == "__main__":
    main()
