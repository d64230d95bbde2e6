"""One provider of ppo_step.py: measures its iterations, in a process of its own.

The process speaks in lines of JSON, its own on standard output, the other side's on standard input:
before every iteration it says {"iterations": [...]}, the seconds by phase of those it has done, and
waits for "go" or "stop"; the last line is its record. What libraries print goes to standard error.
"""

import gc
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.command_line import command, mistakes_in_one_line
from benchmarks.ppo_job import GoesOn, Iterations, Job, Measured, job_as_json, job_from
from benchmarks.timing import free_memory

PROVIDERS = ("trident", "trl", "trl, mixed", "trident, ptx")


def measure(
    job: Job,
    device: torch.device,
    goes_on: GoesOn,
    *,
    provider: str = "trident",
    weights: Path | None = None,
) -> dict[str, Any]:
    """Return a provider's record: medians over the iterations after the first.

    weights: the folder of ppo_weights.py, which TRL needs. Raises RuntimeError where it did another
    amount of work, or its losses are not finite; ImportError where TRL is missing.
    """
    job = job if provider == "trident, ptx" else job.plain()
    free_memory(device)
    gc.freeze()  # TRL collects garbage in every iteration: only what it makes itself
    try:
        done, settings = _run(job, device, goes_on, provider, weights)
    finally:
        gc.unfreeze()
    free_memory(device)
    _check(job, done, provider)
    return _record(job, done, provider) | {"settings": settings, "job": job_as_json(job)}


def _run(
    job: Job, device: torch.device, goes_on: GoesOn, provider: str, weights: Path | None
) -> tuple[Measured, dict[str, Any]]:
    """Return what a provider did, and what it was told; it loads its own libraries alone."""
    if not provider.startswith("trl"):
        from benchmarks.ppo_trident import run_trident

        return run_trident(job, device, goes_on, weights), {}
    from benchmarks.trl_ppo import run_trl, settings

    if weights is None:
        raise ValueError("TRL starts from a folder of weights")
    is_mixed = provider == "trl, mixed"
    return (
        run_trl(job, device, goes_on, weights, is_mixed=is_mixed),
        settings(job, is_mixed=is_mixed),
    )


def _record(job: Job, done: Measured, provider: str) -> dict[str, Any]:
    totals = [sum(phases.values()) for phases in done.seconds]
    median = statistics.median(totals)
    return {
        "benchmark": "ppo_step",
        "workload": job.workload,
        "provider": provider,
        "median_s": median,
        "min_s": min(totals),
        "num_samples": len(totals),
        "phase_s": {
            phase: statistics.median(phases[phase] for phases in done.seconds)
            for phase in done.seconds[0]
        },
        "episodes_per_s": job.num_episodes / median,
        "num_response_tokens": sum(done.lengths[-1]),
        "response_lengths": _lengths(done.lengths),
        "num_updates": done.num_updates,
        "policy_loss": done.losses[0],
        "value_loss": done.losses[1],
        "first_kl_per_token": done.kl_per_token,
        "before_training": done.before,
        "peak_bytes": done.peak_bytes,
        "start_bytes": done.start_bytes,
    }


def _lengths(lengths: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return what all iterations' responses are like; std 0 where there is one."""
    every = [length for iteration in lengths for length in iteration]
    return {
        "mean": statistics.mean(every),
        "std": statistics.stdev(every) if len(every) > 1 else 0.0,
        "min": min(every),
        "max": max(every),
        "count": len(every),
    }


def _check(job: Job, done: Measured, provider: str) -> None:
    """Raise RuntimeError where a provider did not do the job."""
    for lengths in done.lengths:
        if len(lengths) != job.num_episodes:
            raise RuntimeError(
                f"{provider} had {len(lengths)} episodes, the job has {job.num_episodes}"
            )
        # An end before the shortest is improbable, not impossible.
        is_wrong = (
            any(length != job.response_tokens for length in lengths)
            if job.eos_id is None
            else not 1 <= min(lengths) <= max(lengths) <= job.response_tokens
        )
        if is_wrong:
            raise RuntimeError(
                f"{provider} drew responses of {min(lengths)} to {max(lengths)} tokens, the job "
                f"has {job.shortest} to {job.response_tokens}"
            )
    if done.num_updates != job.num_updates:
        raise RuntimeError(
            f"{provider} took {done.num_updates} optimizer steps, the job has {job.num_updates}"
        )
    if not all(math.isfinite(loss) for loss in done.losses):
        raise RuntimeError(f"{provider}'s losses are not finite: {done.losses}")


@mistakes_in_one_line()
def main() -> None:
    """Measure the provider that the arguments name, iteration by iteration as it is told."""
    parser = command("ppo_provider")
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--job", required=True, help="a job's fields as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder of ppo_weights.py")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    spoken = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints to standard output
    job = job_from(json.loads(arguments.job))
    record = measure(
        job,
        torch.device(arguments.device),
        lambda iterations: _is_told_to(spoken, iterations),
        provider=arguments.provider,
        weights=arguments.weights,
    )
    _say(spoken, {"record": record})


def _is_told_to(spoken: TextIO, iterations: Iterations) -> bool:
    _say(spoken, {"iterations": list(iterations)})
    return sys.stdin.readline() == "go\n"


def _say(spoken: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=spoken, flush=True)


if __name__ == "__main__":
    main()
