"""A provider's steps in a process of its own, each when its turn comes.

    python -m benchmarks.turns FOLDER PROVIDER

is what benchmarks.real_steps starts: FOLDER has job.pickle and the weights, and lines come and go
on stdin and stdout. A provider is a loop of training steps, ours, an eager one or transformers'
Trainer, that waits for its turn between two of them.
"""

import contextlib
import importlib
import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import command
from benchmarks.real_job import RealJob
from benchmarks.timing import free_memory, synchronize, tensor_bytes, watched_memory

PROVIDERS = {
    "trident": "benchmarks.trident_steps",
    "huggingface, eager": "benchmarks.padded_steps",
    "huggingface, Trainer": "benchmarks.trainer_steps",
}
"""By name the module whose run(job, turns, folder, passes) takes the steps."""
NUM_TRIAL_STEPS = 3
"""Of each number of passes: one to warm up, two that count. Our choice."""


@dataclass(kw_only=True)
class Turns:
    """Whose turn it is, and what a step took."""

    job: RealJob
    device: torch.device
    num_steps: int
    await_turn: Callable[[], object]
    tell: Callable[[dict[str, Any]], object]
    state: Callable[[], Sequence[torch.Tensor]] = tuple
    """What the provider holds between steps, which it sets."""
    _found: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> Iterator[int]:
        """Yield each step's number when its turn has come; the provider takes the step and calls
        report before it asks for the next."""
        for step in range(self.num_steps):
            self.await_turn()
            is_metered = self.job.is_metered(step)
            held = tensor_bytes(self.state()) if is_metered else 0
            meter = watched_memory(self.device) if is_metered else contextlib.nullcontext([0])
            synchronize(self.device)
            started, used = time.perf_counter(), time.process_time()
            with meter as peak:
                yield step
                synchronize(self.device)
            spent = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - used,
            }
            memory = {"state_bytes": held, "peak_bytes": held + peak[0]} if is_metered else {}
            self.tell({"step": step} | spent | memory | self._found)

    def report(self, *, loss: float, num_tokens: int, num_positions: int, num_passes: int) -> None:
        """Say what the step did: its loss, the tokens that it read, and the positions that it
        computed, padding included."""
        self._found = {
            "loss": loss,
            "num_tokens": num_tokens,
            "num_positions": num_positions,
            "num_passes": num_passes,
        }


def fastest_passes(job: RealJob, device: torch.device, run: Callable[[Turns, int], None]) -> int:
    """Return into how many passes the provider cuts a batch to be fastest."""
    if len(job.passes) == 1:
        return job.passes[0]
    seconds = {}
    for passes in job.passes:
        told: list[dict[str, Any]] = []
        turns = Turns(
            job=job,
            device=device,
            num_steps=NUM_TRIAL_STEPS,
            await_turn=lambda: None,
            tell=told.append,
        )
        run(turns, passes)
        del turns
        free_memory(device)
        seconds[passes] = sum(each["seconds"] for each in told[1:])
    return min(seconds, key=lambda passes: seconds[passes])


def main() -> None:
    """Try the numbers of passes at the first line on stdin, then take a step a line."""
    parser = command("turns")
    parser.add_argument("folder", type=Path, help="has job.pickle and the weights")
    names = " or ".join(repr(name) for name in PROVIDERS)
    parser.add_argument("provider", choices=PROVIDERS, metavar="provider", help=names)
    chosen = parser.parse_args()
    folder: Path = chosen.folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.filterwarnings("ignore")
    job, device = pickle.loads((folder / "job.pickle").read_bytes())
    module = importlib.import_module(PROVIDERS[chosen.provider])

    def tell(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    def await_turn() -> None:
        if not sys.stdin.readline():
            sys.exit("nobody asks for steps any more")

    def run(turns: Turns, passes: int) -> None:
        module.run(turns, folder, passes)

    await_turn()
    passes = fastest_passes(job, device, run)
    tell({"passes": passes, "settings": module.settings()})
    turns = Turns(job=job, device=device, num_steps=job.num_steps, await_turn=await_turn, tell=tell)
    run(turns, passes)


if __name__ == "__main__":
    main()
