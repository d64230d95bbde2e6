"""Shows where the time of one PPO iteration goes: products, attention, the rest, and the host.

    python -m benchmarks.profile_ppo --device cpu
    python -m benchmarks.profile_ppo --device cuda --size 1.3b --ptx --out benchmarks/results

The iteration is that of ppo_step.py: random weights and prompts, responses of one length. First
come iterations that warm up, then one that is timed as it is, then the one under torch's profiler.
The profiler slows every operator by a microsecond or two: both sets of seconds are shown, and
phases of many small operators look worse than they are by their difference.
"""

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import record_function

from benchmarks.command_line import (
    check_context,
    check_minibatches,
    command,
    count,
    count_or_none,
    mistakes_in_one_line,
)
from benchmarks.ppo_job import MICRO_BATCH_TOKENS, Job, job_as_json
from benchmarks.ppo_scene import PHASES, build, random_prompts, run_iteration
from benchmarks.ppo_trident import config_of, feed_of
from benchmarks.screen import print_whole, screen
from benchmarks.step_profile import KINDS, Profile, kind_of, profile_phases
from benchmarks.timing import append_record, machine, records_path
from engine.ranks.device import DTYPES
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from models.sizes import SIZES

ITERATION = "iteration"
PRODUCTIVE = ("gemm", "attention")
"""Kinds that a network cannot do without; what is left is overhead, or to be explained."""
HOST = "host"
"""Outside of any operator; on a GPU: no kernel, copy or fill runs."""
NUM_OTHERS = 10


@dataclass(frozen=True, kw_only=True)
class ProfiledIteration:
    """Where the time of an iteration went."""

    profiles: Mapping[str, Profile]
    """Of the iteration and of each of its phases."""
    seconds: Mapping[str, float]
    """By phase, of the iteration before it, which ran without the profiler."""

    def shares(self, part: str) -> dict[str, float]:
        """Return what share of the wall time of the iteration or a phase each kind has. On a CPU
        they add up to 1; a GPU's streams overlap."""
        profile = self.profiles[part]
        spent = {kind: profile.by_kind.get(kind, 0.0) for kind in (*KINDS, "other")}
        return {
            kind: ms / profile.wall_ms for kind, ms in (spent | {HOST: profile.idle_ms}).items()
        }

    def others(self) -> list[tuple[str, float, int]]:
        """Return the operators or kernels of other kinds than products and attention that take
        longest: name, ms and calls."""
        kernels = self.profiles[ITERATION].kernels
        return [k for k in kernels if kind_of(k[0]) not in PRODUCTIVE][:NUM_OTHERS]


def profile_iteration(job: Job, device: torch.device, num_warm_ups: int = 1) -> ProfiledIteration:
    """Run iterations that warm up, one that is timed, and one under the profiler."""
    config = config_of(job, num_warm_ups + 2)
    parallel = start_parallel(ParallelLayout(), seed=0)
    feed = feed_of(job, config, parallel)
    scene = build(config, (job.size, job.critic_size), parallel, feed)
    prompts = random_prompts(job.size, job.num_episodes, job.prompt_tokens)
    for number in range(num_warm_ups):
        run_iteration(scene, config, prompts, number)
    plain = run_iteration(scene, config, prompts, num_warm_ups)

    def iteration() -> None:
        with record_function(ITERATION):
            run_iteration(scene, config, prompts, num_warm_ups + 1)

    profiles = profile_phases(iteration, device, [ITERATION, *PHASES])
    seconds = plain.seconds | {ITERATION: plain.total_seconds}
    return ProfiledIteration(profiles=profiles, seconds=seconds)


def record_of(found: ProfiledIteration, job: Job) -> dict[str, Any]:
    """Return a profile as a record."""
    parts = (ITERATION, *PHASES)
    return {
        "benchmark": "profile_ppo",
        "shares": {part: found.shares(part) for part in parts},
        "profiled_s": {part: found.profiles[part].wall_ms / 1e3 for part in parts},
        "unprofiled_s": dict(found.seconds),
        "others": [[name[:140], ms, count] for name, ms, count in found.others()],
        "job": job_as_json(job),
    }


@mistakes_in_one_line()
def main() -> None:
    """Profile an iteration; print tables and, with --out, append a record."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    job = _job(arguments, device)
    where = machine(device, DTYPES[job.numerics.dtype])
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    found = profile_iteration(job, device, arguments.num_warm_ups)
    print_whole(console, _shares_table(found, job))
    print_whole(console, _others_table(found))
    if arguments.out:
        append_record(records_path(arguments.out, device), record_of(found, job) | where)


def _shares_table(found: ProfiledIteration, job: Job) -> Table:
    parts = (ITERATION, *PHASES)
    text = f", {job.ptx_examples_per_episode} x {job.pretraining_tokens} of text an episode"
    table = Table("share of the wall time", *parts)
    table.title = (
        f"{job.size.num_layers} x {job.size.hidden_size}, {job.numerics.dtype}: {job.num_episodes} "
        f"episodes of {job.prompt_tokens} + {job.response_tokens} tokens, minibatches of "
        f"{job.minibatch_size}{text if job.ptx_examples_per_episode else ''}"
    )
    shares = {part: found.shares(part) for part in parts}

    def row(name: str, *kinds: str) -> None:
        sums = (sum(shares[part][kind] for kind in kinds) for part in parts)
        table.add_row(name, *(f"{value:.1%}" for value in sums))

    row("products and attention", *PRODUCTIVE)
    table.add_section()
    for kind in sorted(shares[ITERATION], key=lambda kind: -shares[ITERATION][kind]):
        row(kind, kind)
    table.add_section()
    profiled = (found.profiles[part].wall_ms / 1e3 for part in parts)
    table.add_row("seconds under the profiler", *(f"{value:.3f}" for value in profiled))
    table.add_row("seconds without it", *(f"{found.seconds[part]:.3f}" for part in parts))
    return table


def _others_table(found: ProfiledIteration) -> Table:
    """The longest operators of other kinds, with their milliseconds in each phase."""
    wall = found.profiles[ITERATION].wall_ms
    in_phases = [{name: ms for name, ms, _ in found.profiles[p].kernels} for p in PHASES]
    phases = [f"{phase}, ms" for phase in PHASES]
    table = Table("the longest others", "kind", "ms", "share", "calls", "us a call", *phases)
    for name, ms, calls in found.others():
        cells = [f"{ms:.1f}", f"{ms / wall:.1%}", f"{calls}", f"{ms / calls * 1e3:.1f}"]
        cells += [f"{of_phase.get(name, 0.0):.1f}" for of_phase in in_phases]
        table.add_row(name[:100], kind_of(name), *cells)
    return table


def _job(arguments: argparse.Namespace, device: torch.device) -> Job:
    on_gpu = device.type == "cuda"
    size = SIZES[arguments.size or ("1.3b" if on_gpu else "small")]
    dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
    check_minibatches(arguments.num_episodes, arguments.minibatch_size)
    num_tokens = arguments.prompt_tokens + arguments.response_tokens
    check_context("--prompt-tokens and --response-tokens", num_tokens, size.context_length)
    return Job(
        size=size,
        critic_size=size,
        numerics=Numerics(dtype=dtype),
        num_episodes=arguments.num_episodes,
        minibatch_size=arguments.minibatch_size,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        pretraining_tokens=size.context_length,
        ptx_examples_per_episode=int(arguments.ptx),
        micro_batch_tokens=arguments.micro_batch_tokens or MICRO_BATCH_TOKENS[arguments.device],
    )


def _parse() -> argparse.Namespace:
    parser = command("profile_ppo")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: small, on a GPU 1.3b")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")
    parser.add_argument("--ptx", action="store_true", help="a pretraining sequence an episode")
    parser.add_argument("--num-episodes", type=count, default=64)
    parser.add_argument("--minibatch-size", type=count, default=16)
    parser.add_argument("--prompt-tokens", type=count, default=64)
    parser.add_argument("--response-tokens", type=count, default=64)
    parser.add_argument("--micro-batch-tokens", type=count)
    parser.add_argument(
        "--num-warm-ups", type=count_or_none, default=1, help="iterations before both"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
