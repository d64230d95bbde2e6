"""Times an iteration of PPO beside TRL's PPOTrainer at equal work, and one of PPO-ptx.

    python -m benchmarks.ppo_step --device cpu --size tiny
    python -m benchmarks.ppo_step --device cuda --size 1.3b --out benchmarks/results

"trident" and "trl" are plain PPO on models of the same sizes with random weights, on the same
prompts, with responses of one length that nothing ends, in as many optimizer steps of as many
episodes; see trl_ppo.py for how TRL is set. "trident, ptx" adds the pretraining gradient, which TRL
does not have. The first iteration warms up and is not counted.

Providers run one after the other, and each has given its memory back before the next: at 1.3B on
80 GB ours takes 58 GB between phases and a network's activations besides, TRL 26 GB in bf16 (42 GB
and 5 GB mixed) and its logits.
"""

import argparse
import dataclasses
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import trl_ppo
from benchmarks.ppo_job import Effort, Job, Measured, peak_bytes
from benchmarks.ppo_scene import PHASES, build, random_feed, random_prompts, run_iteration
from benchmarks.timing import append_record, free_memory, machine, records_path
from engine.config import UserError
from engine.feed import Feed
from engine.parallel import Parallel, start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES

PROVIDERS = ("trident", "trl", "trl, mixed", "trident, ptx")


def config_of(job: Job, num_iterations: int) -> PPOConfig:
    """Return the paper's coefficients for a job."""
    num_ptx = job.ptx_examples_per_episode
    return PPOConfig(
        data=PPOData(
            pretraining_tokens=job.pretraining_tokens, max_prompt_tokens=job.prompt_tokens
        ),
        sampling=SamplingConfig(
            max_new_tokens=job.response_tokens,
            num_slots=min(job.num_episodes, 256),
            # All prompts in few steps, as a batch generator has them: at most 16k tokens at once.
            prefill_tokens=max(1024, min(2**14, job.num_episodes * job.prompt_tokens)),
        ),
        iterations=num_iterations,
        rollout_batch_size=job.num_episodes,
        minibatch_size=job.minibatch_size,
        ptx_coef=PPOConfig.ptx_coef if num_ptx else 0.0,
        ptx_examples_per_episode=max(1, num_ptx),
        micro_batch_tokens=job.micro_batch_tokens,
        numerics=job.numerics,
    )


def feed_of(job: Job, config: PPOConfig, parallel: Parallel) -> Feed | None:
    """Return the job's pretraining text, None without ptx."""
    if not job.ptx_examples_per_episode:
        return None
    return random_feed(config, job.size, parallel, job.pretraining_tokens)


def run_trident(job: Job, device: torch.device, effort: Effort) -> Measured:
    """Run this engine's iterations."""
    config = config_of(job, effort.num_samples + 1)
    parallel = start_parallel(ParallelLayout(), seed=0)
    feed = feed_of(job, config, parallel)
    scene = build(config, (job.size, job.critic_size), parallel, feed)
    prompts = random_prompts(job.size, job.num_episodes, job.prompt_tokens)
    iterations = []
    started = time.monotonic()
    for number in range(effort.num_samples + 1):
        if number > 1 and time.monotonic() - started > effort.seconds:
            break
        iterations.append(run_iteration(scene, config, prompts, number))
    last = iterations[-1]
    return Measured(
        seconds=[iteration.seconds for iteration in iterations[1:]],
        num_response_tokens=int(last.rollout.response_mask.sum()),
        num_updates=job.num_updates,
        losses=(last.values["update/policy_loss"], last.values["update/value_loss"]),
        kl_per_token=iterations[0].values["score/kl_per_token"],
        peak_bytes=peak_bytes(device),
    )


def measure(
    job: Job, device: torch.device, effort: Effort, *, provider: str = "trident"
) -> dict[str, Any]:
    """Return a provider's record: medians over the iterations after the first.

    Raises RuntimeError where it did another amount of work, or its losses are not finite;
    ImportError where TRL is missing.
    """
    job = job if provider == "trident, ptx" else job.plain()
    free_memory(device)
    if provider.startswith("trl"):
        run: Callable[..., Measured] = trl_ppo.run_trl
        options = {"is_mixed": provider == "trl, mixed"}
    else:
        run, options = run_trident, {}
    gc.freeze()  # TRL collects garbage in every iteration: only what it makes itself
    try:
        done = run(job, device, effort, **options)
    finally:
        gc.unfreeze()
    free_memory(device)
    _check(job, done, provider)
    totals = [sum(phases.values()) for phases in done.seconds]
    return {
        "benchmark": "ppo_step",
        "provider": provider,
        "median_s": statistics.median(totals),
        "min_s": min(totals),
        "num_samples": len(totals),
        "phase_s": {
            phase: statistics.median(phases[phase] for phases in done.seconds)
            for phase in done.seconds[0]
        },
        "episodes_per_s": job.num_episodes / statistics.median(totals),
        "num_response_tokens": done.num_response_tokens,
        "num_updates": done.num_updates,
        "policy_loss": done.losses[0],
        "value_loss": done.losses[1],
        "first_kl_per_token": done.kl_per_token,
        "peak_bytes": done.peak_bytes,
        "order": "one after the other, memory given back between",
        "settings": trl_ppo.settings(job, is_mixed=provider == "trl, mixed")
        if provider.startswith("trl")
        else {},
        "job": dataclasses.asdict(job),
    }


def _check(job: Job, done: Measured, provider: str) -> None:
    """Raise RuntimeError where a provider did not do the job."""
    wanted, found = job.num_response_tokens, done.num_response_tokens
    if found != wanted:
        raise RuntimeError(f"{provider} drew {found} response tokens, the job has {wanted}")
    if done.num_updates != job.num_updates:
        raise RuntimeError(
            f"{provider} took {done.num_updates} optimizer steps, the job has {job.num_updates}"
        )
    if not all(math.isfinite(loss) for loss in done.losses):
        raise RuntimeError(f"{provider}'s losses are not finite: {done.losses}")


def main() -> None:
    """Time the providers; print a table and, with --out, append each record as it is there."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    where = machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    job = _job(arguments, device)
    effort = Effort(num_samples=arguments.num_samples, seconds=arguments.seconds)
    records: list[dict[str, Any]] = []
    for provider in arguments.providers:
        try:
            record = measure(job, device, effort, provider=provider)
        except ImportError as error:
            console.print(f"{provider} is left out: {error}")
            continue
        except (torch.OutOfMemoryError, UserError) as error:
            console.print(f"{provider} does not fit: {error}")
            continue
        ours = next((r for r in records if r["provider"] == "trident"), None)
        if ours and provider.startswith("trl"):
            record["trident_episodes_ratio"] = ours["episodes_per_s"] / record["episodes_per_s"]
        records.append(record)
        if arguments.out:
            append_record(records_path(arguments.out, device), record | where)
        console.print(f"{provider}: {record['episodes_per_s']:.2f} episodes/s")
    console.print(_table(job, records))


def _job(arguments: argparse.Namespace, device: torch.device) -> Job:
    on_gpu = device.type == "cuda"
    name = arguments.size or ("1.3b" if on_gpu else "tiny")
    return Job(
        size=SIZES[name],
        critic_size=SIZES[arguments.critic_size or name],
        numerics=Numerics(dtype="bf16" if on_gpu else "fp32", recompute=arguments.recompute),
        num_episodes=arguments.num_episodes,
        minibatch_size=arguments.minibatch_size,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        pretraining_tokens=SIZES[name].context_length,
        ptx_examples_per_episode=arguments.ptx_examples_per_episode,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )


def _table(job: Job, records: list[dict[str, Any]]) -> Table:
    title = (
        f"{job.num_episodes} episodes of {job.prompt_tokens} + {job.response_tokens} tokens, "
        f"minibatches of {job.minibatch_size}; ptx: {job.ptx_examples_per_episode} x "
        f"{job.pretraining_tokens} tokens of text an episode"
    )
    table = Table("provider", *PHASES, "seconds", "episodes/s", "ours over it", "peak GB")
    table.title = title
    for record in records:
        ratio = record.get("trident_episodes_ratio")
        phases = record["phase_s"]
        table.add_row(
            record["provider"],
            *(f"{phases[phase]:.3f}" if phase in phases else "" for phase in PHASES),
            f"{record['median_s']:.3f}",
            f"{record['episodes_per_s']:.2f}",
            f"{ratio:.2f}" if ratio else "",
            f"{record['peak_bytes'] / 1e9:.2f}",
        )
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_step")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: tiny, on a GPU 1.3b")
    parser.add_argument("--critic-size", choices=SIZES, help="default: the policy's")
    parser.add_argument("--num-episodes", type=int, default=64)
    parser.add_argument("--minibatch-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--ptx-examples-per-episode", type=int, default=1)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--num-samples", type=int, default=3, help="iterations after the first")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of a provider; one iteration is counted"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        default=["trident", "trl", "trident, ptx"],
        help="in this order",
    )
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
