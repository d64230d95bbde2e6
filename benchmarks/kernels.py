"""Compares the kernels with what others ship: one process, the same tensors, taking turns.

    python -m benchmarks.kernels --device cuda --out benchmarks/results
    python -m benchmarks.kernels --device cpu --ops gae sample --quick
    python -m benchmarks.kernels --ops linear_logprobs --size tokens=131072,hidden=4096 --limit 5

A provider is timed as a rival only when it gives the right result; see README.md beside this file.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import command, mistakes_in_one_line, seconds
from benchmarks.kernel_suite.case import Effort, cases
from benchmarks.kernel_suite.decode_attention import DECODE_ATTENTION, GROUPED_DECODE_ATTENTION
from benchmarks.kernel_suite.full_kl import FULL_KL
from benchmarks.kernel_suite.gae import GAE
from benchmarks.kernel_suite.gated import GATED
from benchmarks.kernel_suite.layer_norm import LAYER_NORM
from benchmarks.kernel_suite.linear_logprobs import LINEAR_LOGPROBS, LINEAR_LOSS
from benchmarks.kernel_suite.logprobs import LOGPROBS, LOGPROBS_ENTROPY
from benchmarks.kernel_suite.operation import BOTH_MODES, Operation, Size
from benchmarks.kernel_suite.policy_loss import POLICY_LOSS
from benchmarks.kernel_suite.ranking_loss import RANKING_LOSS
from benchmarks.kernel_suite.report import plot, table
from benchmarks.kernel_suite.rotate import ROTATE
from benchmarks.kernel_suite.sample import SAMPLE, SAMPLE_TOP_P
from benchmarks.kernel_suite.value_loss import VALUE_LOSS
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, free_memory, machine, records_path
from engine.errors import UserError

OPERATIONS = {
    operation.name: operation
    for operation in (
        LOGPROBS,
        LOGPROBS_ENTROPY,
        LINEAR_LOGPROBS,
        LINEAR_LOSS,
        FULL_KL,
        GAE,
        POLICY_LOSS,
        VALUE_LOSS,
        RANKING_LOSS,
        SAMPLE,
        SAMPLE_TOP_P,
        LAYER_NORM,
        GATED,
        ROTATE,
        DECODE_ATTENTION,
        GROUPED_DECODE_ATTENTION,
    )
}
FULL = Effort(min_samples=20, max_samples=100, seconds=3.0)
QUICK = Effort(min_samples=5, max_samples=20, seconds=0.5, num_sizes=1)


@mistakes_in_one_line()
def main() -> None:
    """Run the operations of the command line: a table a case, and with --out records and plots."""
    arguments = _parse()
    # Optional packages announce, as they are imported, which other packages they miss.
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    effort = QUICK if arguments.quick else FULL
    effort = dataclasses.replace(effort, provider_seconds=arguments.limit)
    console = screen()
    where = machine(device)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if device.type != "cuda":
        console.print("No GPU: trident is its reference path here, plain torch without Triton.")

    def publish(record: dict[str, Any]) -> None:
        if arguments.out:
            append_record(records_path(arguments.out, device), record | where)

    if not any(
        chosen_sizes(OPERATIONS[name].sizes[device.type], arguments.size) for name in arguments.ops
    ):
        raise UserError("no operation of these has the numbers that --size names")
    for name in arguments.ops:
        operation = _with_providers(OPERATIONS[name], arguments.providers)
        sizes = chosen_sizes(operation.sizes[device.type], arguments.size)[: effort.num_sizes]
        records = []
        for case in cases(operation, device, sizes, arguments.modes):
            case.run(effort, publish)
            print_whole(console, table(case.records, name, case.size, case.mode))
            for record in case.records:
                if record["status"] != "skipped":
                    publish(record)
            records += case.records
            del case
            free_memory(device)
        if arguments.out and sizes and not arguments.no_plots:
            picture = records_path(arguments.out, device).with_suffix("") / f"{name}.png"
            title = f"{name} on {where['device']}, {where['date']}, commit {where['commit']}"
            plot(records, sizes, title, picture)
            console.print(f"plot: {picture}")


def chosen_sizes(sizes: Sequence[Size], wanted: Sequence[Size]) -> list[Size]:
    """Return the sizes that agree with one of those wanted, in which numbers may be left out; where
    none does, the first with the wanted numbers in place of its own. All of them without a wish.

    A wish that names what the operation does not have is not meant for it.
    """
    if not wanted:
        return list(sizes)
    found: list[Size] = []
    for wish in wanted:
        if wish.keys() <= sizes[0].keys():
            agreeing = [size for size in sizes if wish.items() <= size.items()]
            found += agreeing or [sizes[0] | wish]
    return found


def _with_providers(operation: Operation, names: Sequence[str] | None) -> Operation:
    """Return the operation with those of its providers that are named, None for all."""
    if names is None:
        return operation
    kept = tuple(provider for provider in operation.providers if provider.name in names)
    return dataclasses.replace(operation, providers=kept)


def _size(text: str) -> Size:
    """Parse tokens=131072,hidden=4096."""
    pairs = [part.partition("=") for part in text.split(",")]
    size = {name: int(number) for name, _, number in pairs}
    if min(size.values()) < 1:
        raise ValueError(f"{text}: every number is at least 1")
    return size


def _parse() -> argparse.Namespace:
    parser = command("kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--quick", action="store_true", help="one size, few samples")
    parser.add_argument(
        "--size",
        nargs="+",
        type=_size,
        default=[],
        metavar="NAME=N,...",
        help="only sizes with these numbers, or one with them",
    )
    parser.add_argument("--modes", nargs="+", choices=BOTH_MODES, default=BOTH_MODES)
    names = sorted({p.name for operation in OPERATIONS.values() for p in operation.providers})
    parser.add_argument("--providers", nargs="+", choices=names, help="default: all")
    parser.add_argument(
        "--limit", type=seconds, default=60.0, help="seconds of a provider, first call and samples"
    )
    parser.add_argument("--no-plots", action="store_true", help="records alone")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended) and plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
