"""What the records of ppo_step.py say side by side: ratios, goals, one table."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.ppo_job import Job
from benchmarks.ppo_scene import PHASES
from benchmarks.records import Record

GOALS = {"fixed": 1.4, "mixed": 2.5}
"""Episodes/s of ours over TRL's on a CPU in fp32; our choice."""
MEMORY_GOAL = 0.6
"""Ours over TRL's peak there, most."""
_MOST_STANDARD_ERRORS = 4.5
"""That two means of lengths may lie apart; our choice: by chance once in 150,000 runs."""
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
"""By which two means over log-probs or values of the same weights may differ; our choice."""


def beside_ours(ours: Record, other: Record) -> dict[str, Any]:
    """Return the fields of another provider's record that hold it against ours.

    Raises RuntimeError where it started from other weights or drew other lengths.
    """
    _check_weights(ours, other)
    apart = _standard_errors(ours["response_lengths"], other["response_lengths"])
    if apart > _MOST_STANDARD_ERRORS:
        means = [record["response_lengths"]["mean"] for record in (ours, other)]
        raise RuntimeError(
            f"{other['provider']} drew responses of {means[1]:.1f} tokens, ours {means[0]:.1f}: "
            f"{apart:.1f} standard errors apart, nothing is compared"
        )
    found = {"lengths_standard_errors_apart": apart}
    if other["provider"].startswith("trl"):
        found["trident_episodes_ratio"] = ours["episodes_per_s"] / other["episodes_per_s"]
        found["trident_memory_ratio"] = ours["peak_bytes"] / other["peak_bytes"]
    return found


def _check_weights(ours: Record, other: Record) -> None:
    tolerance = _TOLERANCES[ours["job"]["numerics"]["dtype"]]
    for name, mine in ours["before_training"].items():
        theirs = other["before_training"][name]
        if not abs(mine - theirs) <= tolerance:
            raise RuntimeError(
                f"{other['provider']} starts with a mean {name} of {theirs:.5f}, ours with "
                f"{mine:.5f}: other weights, nothing is compared"
            )


def _standard_errors(a: dict[str, float], b: dict[str, float]) -> float:
    """Return how far apart two means lie, in standard errors of their difference."""
    error = math.sqrt(sum(side["std"] ** 2 / side["count"] for side in (a, b)))
    difference = abs(a["mean"] - b["mean"])
    return difference / error if error else (math.inf if difference else 0.0)


def fastest_trl(records: Sequence[Record]) -> Record | None:
    """Return TRL's record at its fastest, None where it has none beside ours."""
    found = [r for r in records if "trident_episodes_ratio" in r]
    return max(found, key=lambda r: r["episodes_per_s"], default=None)


def goal_lines(records: Sequence[Record], device_type: str) -> list[str]:
    """Return what was aimed at and what was reached, where there is a goal."""
    trl = fastest_trl(records)
    if trl is None or device_type != "cpu" or trl["job"]["numerics"]["dtype"] != "fp32":
        return []
    speed, memory = trl["trident_episodes_ratio"], trl["trident_memory_ratio"]
    goal = GOALS[trl["workload"]]
    return [
        f"episodes/s over {trl['provider']}'s, goal {goal}: reached {speed:.2f}",
        f"peak memory over {trl['provider']}'s, goal {MEMORY_GOAL} at most: reached {memory:.2f}",
    ]


def table(job: Job, records: Sequence[Record]) -> Table:
    """Return one row a provider."""
    tokens = f"{job.response_tokens}"
    if job.eos_id is not None:
        tokens = f"{job.shortest} to {job.response_tokens}"
    title = (
        f"{job.workload} lengths, {job.numerics.dtype}: {job.num_episodes} episodes of "
        f"{job.prompt_tokens} + {tokens} tokens, minibatches of {job.minibatch_size}; "
        f"ptx: {job.ptx_examples_per_episode} x {job.pretraining_tokens} tokens of text an episode"
    )
    speeds = ("seconds", "episodes/s", "ours over its speed")
    memories = ("peak GB", "before models", "ours over its peak")
    shown = Table("provider", *PHASES, *speeds, *memories, "tokens drawn", title=title)
    for record in records:
        phases, lengths = record["phase_s"], record["response_lengths"]
        ratios = [record.get(f"trident_{name}_ratio") for name in ("episodes", "memory")]
        speed, memory = (f"{ratio:.2f}" if ratio else "" for ratio in ratios)
        shown.add_row(
            record["provider"],
            *(f"{phases[phase]:.3f}" if phase in phases else "" for phase in PHASES),
            f"{record['median_s']:.3f}",
            f"{record['episodes_per_s']:.2f}",
            speed,
            f"{record['peak_bytes'] / 1e9:.2f}",
            f"{record['start_bytes'] / 1e9:.2f}",
            memory,
            f"{lengths['mean']:.1f} ({lengths['min']} to {lengths['max']})",
        )
    return shown
