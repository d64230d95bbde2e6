"""Whether a signal has asked the run to stop, which it does at the next step boundary.

    with StopSignals(parallel) as stop:
        for step in ...:
            ...
            is_asked = stop.is_asked()
            if is_asked or ...:
                checkpointer.save(...)
            if is_asked:
                stop.leave(step + 1)

Slurm sends SIGUSR1 before a job's time limit (recipes/slurm/*.sbatch ask for it) and SIGTERM when
it preempts or cancels a job; torchrun passes SIGTERM on.
"""

import signal
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from engine.parallel import Parallel

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h, try again: recipes/slurm/launch.sh requeues a job that ends with
it."""


class StopSignals:
    """Notes the signals that ask a run to stop, instead of dying of them."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._is_noted = False
        self._previous: dict[signal.Signals, Any] = {}

    def is_asked(self) -> bool:
        """Return whether a signal has reached any rank: the same answer on all, who call together.

        One all-reduce of one number. Signals reach the ranks at different steps, and a checkpoint
        is written by all of them.
        """
        flag = torch.tensor(float(self._is_noted), device=self._parallel.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())  # sync: as the step's metrics, which were read just before

    def leave(self, step: int) -> NoReturn:
        """End the process with EXIT_STATUS; the checkpoint of `step` has been written."""
        if self._parallel.is_writer:
            print(f"stopped by a signal at step {step}; the same command continues", flush=True)
        raise SystemExit(EXIT_STATUS)

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_noted = True
