"""Compares the kernels with what others ship: one process, the same tensors, taking turns.

    python -m benchmarks.kernels --device cuda --out benchmarks/results
    python -m benchmarks.kernels --device cpu --ops gae sample --quick

A provider is timed as a rival only when it gives the right result; see README.md beside this file.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.kernel_suite.case import Effort, cases
from benchmarks.kernel_suite.decode_attention import DECODE_ATTENTION
from benchmarks.kernel_suite.full_kl import FULL_KL
from benchmarks.kernel_suite.gae import GAE
from benchmarks.kernel_suite.layer_norm import LAYER_NORM
from benchmarks.kernel_suite.linear_logprobs import LINEAR_LOGPROBS, LINEAR_LOSS
from benchmarks.kernel_suite.logprobs import LOGPROBS, LOGPROBS_ENTROPY
from benchmarks.kernel_suite.ppo_loss import PPO_LOSS
from benchmarks.kernel_suite.ranking_loss import RANKING_LOSS
from benchmarks.kernel_suite.report import plot, table
from benchmarks.kernel_suite.sample import SAMPLE, SAMPLE_TOP_P
from benchmarks.timing import append_record, free_memory, machine, records_path

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
FULL = Effort(min_samples=20, max_samples=100, seconds=3.0)
QUICK = Effort(min_samples=5, max_samples=20, seconds=0.5, num_sizes=1)


def main() -> None:
    """Run the operations of the command line: a table a case, and with --out records and plots."""
    arguments = _parse()
    # Optional packages announce, as they are imported, which other packages they miss.
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    effort = QUICK if arguments.quick else FULL
    console = Console(width=None if sys.stdout.isatty() else 160)
    where = machine(device)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        console.print("No GPU: trident is its reference path here, plain torch without Triton.")
    for name in arguments.ops:
        records = []
        for case in cases(OPERATIONS[name], device, effort.num_sizes):
            case.run(effort)
            console.print(table(case.records, name, case.size, case.mode))
            if arguments.out:
                for record in case.records:
                    if record["status"] != "skipped":
                        append_record(records_path(arguments.out, device), record | where)
            records += case.records
            del case
            free_memory(device)
        if arguments.out:
            picture = records_path(arguments.out, device).with_suffix("") / f"{name}.png"
            title = f"{name} on {where['device']}, {where['date']}, commit {where['commit']}"
            sizes = OPERATIONS[name].sizes[device.type][: effort.num_sizes]
            plot(records, sizes, title, picture)
            console.print(f"plot: {picture}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--quick", action="store_true", help="one size, few samples")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended) and plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
