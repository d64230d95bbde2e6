"""Times a reward model's step with the prompt of a ranking computed once beside once a completion.

    python -m benchmarks.shared_prompts --tokenizer DIR --rankings NAME=FILE ... --device cpu

Of every file of comparisons it counts the tokens of an epoch in both layouts, and takes optimizer
steps of one network on the same batches in turns. The losses must be the same. Assembling a batch
is part of a step; a batch is drawn from the whole file.
"""

import argparse
import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.real_job import ADAM
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path
from engine.data.batches import lengths_of, shapes_of
from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.examples import Example
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError
from engine.feed import step_batch
from engine.losses import comparison_loss
from engine.ranks.device import DTYPES
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.size import size_with
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from engine.training.reduce import reduce_metrics
from models.sizes import SIZES, GPTSize, size_as_json

LAYOUTS = {"separate": False, "shared": True}
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
"""By how much the losses of a batch may differ; the learning rate moves no weight between them."""
Unit = list[Example]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Steps that both layouts take."""

    size: GPTSize
    numerics: Numerics
    batch_size: int
    num_batches: int
    num_samples: int
    """How often each batch is timed in each layout."""
    micro_batch_tokens: int


def read_units(path: Path, tokenizer: Tokenizer, context_length: int) -> list[Unit]:
    """Return a file's comparisons that fit into the context. Raises UserError where none does."""
    records, _ = read_comparisons(path)
    units, _ = comparison_examples(records, tokenizer, max_length=context_length)
    if not units:
        raise UserError(f"{path}: no comparison fits into {context_length} tokens")
    return units


def count_tokens(units: Sequence[Unit]) -> dict[str, Any]:
    """Return how many comparisons there are, of what shape, and the tokens of both layouts."""
    shapes = [shapes_of(units, index) for index in range(len(units))]
    tokens = {name: sum(lengths_of(shapes, share_prompts=how)) for name, how in LAYOUTS.items()}
    rests = [length - prompt for unit in shapes for length, prompt in unit]
    return {
        "num_comparisons": len(units),
        "mean_completions": len(rests) / len(units),
        "mean_prompt_tokens": statistics.mean(unit[0][1] for unit in shapes),
        "mean_completion_tokens": statistics.mean(rests),
        "epoch_tokens": tokens,
        "saved_tokens": 1 - tokens["shared"] / tokens["separate"],
    }


def measure(job: Job, units: Sequence[Unit], parallel: Parallel) -> dict[str, Any]:
    """Return the seconds of a step in both layouts: the median of each batch, averaged over the
    batches. Raises RuntimeError where the layouts' losses differ."""
    network = build_network("scalar", job.size, parallel, numerics=job.numerics)
    # So small a rate that the next step's loss is that of the same weights.
    optimizer = Optimizer(network, dataclasses.replace(ADAM, lr=1e-12), total_steps=1)
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    batch_size = min(job.batch_size, len(units))
    for _ in range(job.num_batches):
        chosen = [units[index] for index in draw.choice(len(units), batch_size, replace=False)]
        steps = {
            name: functools.partial(_step, job, network, optimizer, chosen, how)
            for name, how in LAYOUTS.items()
        }
        losses = {name: step() for name, step in steps.items()}
        if abs(losses["shared"] - losses["separate"]) > TOLERANCES[job.numerics.dtype]:
            raise RuntimeError(f"losses of one batch differ: {losses}")
        for name, (median_s, least_cpu_s) in _in_turns(steps, job.num_samples).items():
            seconds[name].append(median_s)
            cpu_seconds[name].append(least_cpu_s)
    median = {name: statistics.mean(values) for name, values in seconds.items()}
    least_cpu = {name: statistics.mean(values) for name, values in cpu_seconds.items()}
    return {
        "median_s": median,
        "batch_s": seconds,
        # On a busy machine the others' work is not in it.
        "least_cpu_s": least_cpu,
        "speedup": median["separate"] / median["shared"],
        "cpu_speedup": least_cpu["separate"] / least_cpu["shared"],
        "batch_size": batch_size,
        "num_batches": job.num_batches,
        "num_samples": job.num_samples,
        "micro_batch_tokens": job.micro_batch_tokens,
        "size": size_as_json(job.size),
        "numerics": dataclasses.asdict(job.numerics),
    }


def _in_turns(
    steps: Mapping[str, Callable[[], float]], num_samples: int
) -> dict[str, tuple[float, float]]:
    """Return of each the median of its seconds, and the fewest CPU seconds; a step reads its loss,
    and so waits for the device."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(num_samples):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {
        name: (statistics.median(s for s, _ in both), min(cpu for _, cpu in both))
        for name, both in taken.items()
    }


def _step(
    job: Job, network: Network, optimizer: Optimizer, units: Sequence[Unit], share_prompts: bool
) -> float:
    """Take the step as engine/rm.py does; return its loss."""
    parallel = network.parallel
    optimizer.zero_gradients()
    batch = step_batch(units, parallel, job.micro_batch_tokens, share_prompts=share_prompts)
    sums = forward_backward(network, batch.batches, comparison_loss(len(units)))
    optimizer.step(0)
    return float(reduce_metrics(sums, parallel)["loss"])


@mistakes_in_one_line()
def main() -> None:
    """Measure every file; print a table and, with --out, append a record each."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    numerics = Numerics(dtype="fp32" if device.type == "cpu" else "bf16")
    where = machine(device, DTYPES[numerics.dtype])
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    tokenizer = load_tokenizer(arguments.tokenizer)
    parallel = start_parallel(ParallelLayout(), seed=0)
    job = Job(
        size=size_with(arguments.size, tokenizer.vocab_size, arguments.context_length),
        numerics=numerics,
        batch_size=arguments.batch_size,
        num_batches=arguments.num_batches,
        num_samples=arguments.num_samples,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    records = []
    for name, path in arguments.rankings:
        units = read_units(path, tokenizer, job.size.context_length)
        record = {"benchmark": "shared_prompts", "rankings": name}
        records.append(record | count_tokens(units) | measure(job, units, parallel))
        console.print(
            f"{name}: {records[-1]['saved_tokens']:.0%} of the tokens saved, "
            f"{records[-1]['speedup']:.2f} times as fast, "
            f"{records[-1]['cpu_speedup']:.2f} by CPU seconds"
        )
        if arguments.out:
            append_record(records_path(arguments.out, device), records[-1] | where)
    print_whole(console, _table(job, records))


def _table(job: Job, records: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        *("rankings", "comparisons", "K", "prompt", "completion", "tokens, separate", "shared"),
        *("saved", "seconds a step, separate", "shared", "times as fast", "by CPU seconds"),
        title=f"{job.size.num_layers} x {job.size.hidden_size}, {job.batch_size} prompts a step, "
        f"{job.numerics.dtype}; tokens of an epoch",
    )
    for record in records:
        tokens, seconds = record["epoch_tokens"], record["median_s"]
        table.add_row(
            record["rankings"],
            f"{record['num_comparisons']:,}",
            f"{record['mean_completions']:.1f}",
            f"{record['mean_prompt_tokens']:.0f}",
            f"{record['mean_completion_tokens']:.0f}",
            *(f"{tokens[name]:,}" for name in LAYOUTS),
            f"{record['saved_tokens']:.0%}",
            *(f"{seconds[name]:.2f}" for name in LAYOUTS),
            f"{record['speedup']:.2f}",
            f"{record['cpu_speedup']:.2f}",
        )
    return table


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=FILE")
    return name, Path(path)


def _parse(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = command("shared_prompts")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="file or folder")
    add("--rankings", nargs="+", type=_named_file, required=True, metavar="NAME=FILE",
        help="comparisons")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default=default)
    add("--size", choices=SIZES, default="small", help="with the tokenizer's vocabulary")
    add("--context-length", type=count, default=2048, help="longer sequences are left out")
    add("--batch-size", type=count, default=16, help="prompts a step")
    add("--micro-batch-tokens", type=count, default=8192)
    add("--num-batches", type=count, default=3, help="different batches that are timed")
    add("--num-samples", type=count, default=5, help="steps of each batch in each layout")
    add("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args(None if words is None else list(words))


if __name__ == "__main__":
    main()
