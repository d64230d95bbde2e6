"""One command that spends a GPU's minutes: what is right, what is fast, what is neither.

    python -m benchmarks.gpu --budget 480 --out DIR
    python -m benchmarks.gpu --device cpu --quick --out DIR    # do all steps run: a few minutes

Whatever has been measured when the budget ends is in DIR already: <gpu>.jsonl has the records,
steps.jsonl what became of each step, log.txt what they printed, table.txt the table at the end.
The table of a run that was killed:

    python -m benchmarks.gpu --budget 0 --out DIR
"""

import argparse
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from benchmarks.command_line import command, count_or_none, mistakes_in_one_line
from benchmarks.gpu.spend import Spending
from benchmarks.gpu.steps import all_steps
from benchmarks.gpu.summary import read_outcomes, summary
from benchmarks.records import read_records
from benchmarks.screen import FILE_WIDTH, print_whole, screen
from engine.errors import UserError


@mistakes_in_one_line()
def main() -> None:
    """Run the steps within the budget and print what they found."""
    arguments = _parse()
    if arguments.device == "cuda" and arguments.budget > 0 and not torch.cuda.is_available():
        raise UserError("no GPU here; --device cpu --quick shows whether all steps run")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    known = all_steps(arguments.device, arguments.out, is_quick=arguments.quick)
    steps = [step for step in known if any(part in step.name for part in arguments.only)]
    if not steps:
        names = ", ".join(step.name for step in known)
        raise UserError(f"--only {' '.join(arguments.only)} names none of: {names}")
    _check_folder(arguments.out, has_run=arguments.budget <= 0)
    console = screen()
    start = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - start:4.0f} s] {line}", markup=False, highlight=False)

    try:
        if arguments.budget > 0:
            side_by_side = min(16, os.cpu_count() or 1)
            with Spending(
                arguments.out, budget=arguments.budget, side_by_side=side_by_side, say=say
            ) as spending:
                spending.run(steps)
    finally:
        files = [p for p in sorted(arguments.out.glob("*.jsonl")) if p.name != "steps.jsonl"]
        tables = summary(
            [r for path in files for r in read_records(path, skips_broken=True)],
            read_outcomes(arguments.out),
            # The targets are a GPU's, at their own sizes.
            judges_speed=any(p.name != "cpu.jsonl" for p in files) and not arguments.quick,
        )
        for table in tables:
            print_whole(console, table)
        with (arguments.out / "table.txt").open("w", encoding="utf-8") as file:
            for table in tables:
                print_whole(Console(file=file, width=FILE_WIDTH), table)


def _check_folder(folder: Path, *, has_run: bool) -> None:
    """End with an error where the folder cannot be written, or has no run where one is wanted."""
    if has_run and not (folder / "steps.jsonl").exists():
        raise UserError(f"--budget 0 prints the table of a run, and {folder} has none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.txt").touch()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from None


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _parse() -> argparse.Namespace:
    parser = command("gpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget", type=count_or_none, default=480, help="seconds for all steps")
    parser.add_argument("--quick", action="store_true", help="small sizes: do all steps run")
    parser.add_argument("--only", nargs="+", default=[""], help="steps whose names contain these")
    parser.add_argument("--out", type=Path, required=True, help="folder; records are appended")
    return parser.parse_args()


if __name__ == "__main__":
    main()
