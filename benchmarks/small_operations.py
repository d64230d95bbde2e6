"""Times a small parallel operation before and after a process has gathered from its group of one.

    OMP_NUM_THREADS=2 python -m benchmarks.small_operations

A rollout on a CPU is made of operations that take two cores some 10 us. gloo gathers in a thread of
its own, whose copies open an OpenMP team beside the main thread's; libgomp then has more threads
than cores, lets those that wait sleep, and each such operation pays for waking them. Rows: this
engine's group of one rank, and gloo's.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.command_line import command, mistakes_in_one_line
from benchmarks.rivals import ROOT
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path
from engine.ranks.lone_rank import LONE

NUM_ELEMENTS = 1 << 16  # of an exclusive or: torch shares what exceeds 2^15
NUM_CALLS = 2000
OBJECT_BYTES = 1 << 20


def microseconds() -> float:
    """Return the median time of the operation."""
    x = torch.zeros(NUM_ELEMENTS, dtype=torch.int64)
    seconds = []
    for _ in range(NUM_CALLS):
        began = time.perf_counter()
        x.bitwise_xor_(1)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e6


def measure(backend: str) -> dict[str, Any]:
    """Return the times before and after a gather in a group of this process alone."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    before = microseconds()
    dist.all_gather_object([None], bytes(OBJECT_BYTES))
    after = microseconds()
    dist.destroy_process_group()
    return {"before_us": before, "after_us": after}


@mistakes_in_one_line()
def main() -> None:
    """Measure each group in a process of its own; print a table and, with --out, append records."""
    parser = command("small_operations")
    parser.add_argument("--backend", choices=(LONE, "gloo"), help="this one, as a line of JSON")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    arguments = parser.parse_args()
    if arguments.backend:
        print(json.dumps(measure(arguments.backend)))
        return
    device = torch.device("cpu")
    where = machine(device, torch.float32)
    table = Table("group of one rank", "before, us", "after a gather, us")
    table.title = f"{NUM_ELEMENTS} numbers, {torch.get_num_threads()} threads"
    for backend in (LONE, "gloo"):
        program = [sys.executable, "-W", "ignore", "-m", "benchmarks.small_operations"]
        done = subprocess.run(
            [*program, "--backend", backend], capture_output=True, text=True, check=True, cwd=ROOT
        )
        found = json.loads(done.stdout.splitlines()[-1])
        table.add_row(backend, f"{found['before_us']:.1f}", f"{found['after_us']:.1f}")
        if arguments.out:
            record = {"benchmark": "small_operations", "provider": backend} | found | where
            append_record(records_path(arguments.out, device), record)
    print_whole(screen(), table)


if __name__ == "__main__":
    main()
