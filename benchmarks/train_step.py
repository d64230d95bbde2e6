"""Times an optimizer step of training beside what a user would write or pick instead.

    python -m benchmarks.train_step --device cpu --size small
    python -m benchmarks.train_step --device cpu --task sft rm
    python -m benchmarks.train_step --device cuda --size 1.3b --out benchmarks/results

"language": whole sequences of one length beside plain torch (language_step.py). "sft" and "rm":
demonstrations and rankings of real lengths beside an eager loop and transformers' Trainer, which
pad (real_steps.py). The lengths are those of lengths.json, or of a file of yours; the tokens are
random. Trainer needs accelerate: `make rivals`.
"""

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import language_step, lengths, real_steps
from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.real_job import RealJob, make_batches
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.ranks.device import DTYPES
from engine.settings.numerics import Numerics
from models.sizes import SIZES

BATCH_SIZES = {"sft": 32, "rm": 8}
KINDS = {"sft": "demonstrations", "rm": "rankings"}
PASSES = (1, 2, 4, 8)
"""Numbers of micro-batches that each provider tries; our choice: to 4 demonstrations, or the
completions of one prompt, a pass."""
ROUNDS, NUM_SAMPLES = 3, 10
PROVIDERS = tuple(dict.fromkeys((*language_step.PROVIDERS, *real_steps.NEEDS)))


@dataclass(frozen=True, kw_only=True)
class _Desk:
    """Where results go."""

    console: Console
    device: torch.device
    where: dict[str, Any]
    out: Path | None

    def keep(self, record: dict[str, Any]) -> None:
        """Append a record to the device's file, where there is a folder."""
        if self.out:
            append_record(records_path(self.out, self.device), record | self.where)


@mistakes_in_one_line()
def main() -> None:
    """Time the tasks' steps; print a table each and, with --out, append records."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    numerics = Numerics(
        dtype=arguments.dtype or ("fp32" if device.type == "cpu" else "bf16"),
        recompute=arguments.recompute,
    )
    desk = _Desk(
        console=screen(),
        device=device,
        where=machine(device, DTYPES[numerics.dtype]),
        out=arguments.out,
    )
    desk.console.print(", ".join(f"{name} {value}" for name, value in desk.where.items()))
    for task in arguments.task:
        if task == "language":
            _language(arguments, numerics, desk)
        else:
            _on_real_lengths(task, arguments, numerics, desk)


def _language(arguments: argparse.Namespace, numerics: Numerics, desk: _Desk) -> None:
    size = SIZES[arguments.size or ("tiny" if desk.device.type == "cpu" else "1.3b")]
    job = language_step.Job(
        size=size,
        numerics=numerics,
        num_sequences=arguments.num_sequences,
        length=size.context_length,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    peak, source = language_step.peak_flops(desk.device, DTYPES[numerics.dtype])
    effort = language_step.Effort(
        num_samples=arguments.num_samples or NUM_SAMPLES,
        peak_flops=peak,
        peak_flops_source=source,
        with_profile=arguments.profile is not None,
    )
    wanted = arguments.providers or language_step.PROVIDERS
    providers = [each for each in wanted if each in language_step.PROVIDERS]
    if "huggingface" in providers and (lack := real_steps.missing("huggingface, eager")):
        desk.console.print(f"plain torch is left out: {lack}")
        providers.remove("huggingface")
    records = []
    for record in language_step.measure(job, desk.device, providers, effort):
        if text := record.pop("text", None):
            with arguments.profile.open("a") as file:
                file.write(text + "\n")
        else:
            records.append(record)
            desk.console.print(f"{record['provider']}: {record['mfu']:.1%} of {source}")
        desk.keep(record)
    if records:
        print_whole(desk.console, language_step.table(job, records))


def _on_real_lengths(
    task: str, arguments: argparse.Namespace, numerics: Numerics, desk: _Desk
) -> None:
    wanted = arguments.providers or real_steps.NEEDS
    providers = []
    for provider in (each for each in wanted if each in real_steps.NEEDS):
        if lack := real_steps.missing(provider):
            desk.console.print(f"{provider} is left out: {lack}")
        else:
            providers.append(provider)
    if not providers:
        return
    job, source = real_job(task, arguments, numerics, on_gpu=desk.device.type == "cuda")
    records = []
    for record in real_steps.measure(job, desk.device, providers, desk.console.print):
        records.append(record | {"lengths": source})
        desk.keep(records[-1])
    print_whole(desk.console, table(task, records))


def real_job(
    task: str, arguments: argparse.Namespace, numerics: Numerics, *, on_gpu: bool
) -> tuple[RealJob, str]:
    """Return the job of a task and where its lengths are from. Raises UserError."""
    size = SIZES[arguments.size or ("1.3b" if on_gpu else "small")]
    kind, batch_size = KINDS[task], arguments.batch_size or BATCH_SIZES[task]
    if batch_size % max(PASSES):
        raise UserError(f"--batch-size {batch_size} must be a multiple of {max(PASSES)}")
    if arguments.data is None:
        sets, source = lengths.read_table(kind), "lengths.json"
    else:
        rows = lengths.lengths_of(kind, arguments.data, load_tokenizer(arguments.tokenizer))
        sets = {arguments.data.name: lengths.Lengths(num_records=len(rows), rows=rows)}
        source = arguments.data.name
    if arguments.sets:
        if unknown := set(arguments.sets) - set(sets):
            raise UserError(f"--sets {', '.join(sorted(unknown))}: {source} has {', '.join(sets)}")
        sets = {name: sets[name] for name in arguments.sets}
        source = f"{source}: {', '.join(sets)}"
    drawn = lengths.draw(sets, batch_size * arguments.num_batches, longest=size.context_length)
    job = RealJob(
        task=task,
        size=size,
        numerics=numerics,
        batches=make_batches(task, size, drawn, num_batches=arguments.num_batches),
        num_rounds=arguments.num_samples or ROUNDS,
        passes=PASSES,
    )
    return job, source


def table(task: str, records: list[dict[str, Any]]) -> Table:
    """Return the providers' records of a task as a table."""
    last, goal = records[-1], real_steps.GOALS[task]
    unit = "demonstrations" if task == "sft" else "prompts"
    drawn = Table(
        *("provider", "seconds a step", f"{unit}/s", "tokens/s", "padding", "passes", "peak GB"),
        f"ours over it (goal {goal})",
        title=f"{task}: {last['batch_size']} {unit} a step, {last['num_sequences']:.0f} sequences, "
        f"{last['num_tokens']:.0f} tokens without padding, {last['numerics']['dtype']}",
    )
    for record in records:
        ratio = record.get("trident_ratio")
        drawn.add_row(
            record["provider"],
            f"{record['median_s']:.3f}",
            f"{record['examples_per_s']:.1f}",
            f"{record['tokens_per_s']:.0f}",
            f"{record['padding']:.0%}",
            f"{record['num_passes']:.1f}",
            f"{record['peak_bytes'] / 1e9:.3f}",
            f"{ratio:.2f}" if ratio else "",
        )
    return drawn


def _parse(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = command("train_step")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=default)
    add("--task", nargs="+", choices=("language", *KINDS), default=["language"])
    add("--size", choices=SIZES, help="default: 1.3b; on a CPU small, of language tiny")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16, on a CPU fp32")
    add("--recompute", choices=("none", "selective", "full"), default="none")
    add("--num-samples", type=count, help=f"steps of each provider ({NUM_SAMPLES}); of sft and rm"
        f" times that each batch is timed ({ROUNDS})")  # fmt: skip
    add("--providers", nargs="+", choices=PROVIDERS, help="default: all of the task")
    add("--out", type=Path, help="folder for JSON lines (appended)")
    language = parser.add_argument_group("language")
    add = language.add_argument
    add("--num-sequences", type=count, default=16, help="of a step, whole contexts")
    add("--micro-batch-tokens", type=count, default=8192)
    add("--profile", type=Path, help="file for tables of kernels (appended)")
    real = parser.add_argument_group("sft and rm")
    add = real.add_argument
    add("--batch-size", type=count, help="demonstrations (32) or prompts (8) of a step")
    add("--num-batches", type=count, default=3, help="different batches that are timed")
    add("--sets", nargs="+", help="of lengths.json; default: all")
    add("--data", type=Path, help="JSON lines whose lengths are taken; one task then")
    add("--tokenizer", type=Path, help="file or folder that counts the tokens of --data")
    arguments = parser.parse_args(None if words is None else list(words))
    if (arguments.data is None) != (arguments.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    if arguments.data is not None and len(arguments.task) > 1:
        parser.error("--data has the lengths of one --task")
    return arguments


if __name__ == "__main__":
    main()
