"""Times iterations of PPO beside TRL's PPOTrainer at equal work, and of PPO-ptx.

    make rivals
    python -m benchmarks.ppo_step --device cpu
    python -m benchmarks.ppo_step --device cuda --size 1.3b --out benchmarks/results

"trident" and "trl" are plain PPO from the same random weights on the same prompts, in as many
optimizer steps of as many episodes; see trl_ppo.py for how TRL is set. "trident, ptx" adds the
pretraining gradient, which TRL does not have. Responses have one length that nothing ends
("fixed"), or up to twice as many tokens and an end that the model draws ("mixed", ppo_weights.py).
The first iteration warms up and is not counted.

Each provider is a process of its own. Its peak memory on a CPU is all that the process ever held,
interpreter and libraries included; on a GPU what torch gave out there. On a CPU they take turns,
iteration by iteration; on a GPU one ends before the next begins: at 1.3B ours takes 58 GB between
phases and a network's activations besides. TRL takes 26 GB in bf16 (42 GB and 5 GB mixed) and its
logits.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.command_line import (
    check_context,
    check_minibatches,
    command,
    count,
    count_or_none,
    mistakes_in_one_line,
    seconds,
)
from benchmarks.ppo_job import MICRO_BATCH_TOKENS, WORKLOADS, Effort, Job, job_as_json
from benchmarks.ppo_provider import PROVIDERS
from benchmarks.ppo_table import beside_ours, goal_lines, table
from benchmarks.ppo_turns import Opening, Provider, run_in_turns
from benchmarks.ppo_weights import write_weights
from benchmarks.provider_process import Say
from benchmarks.rivals import missing_rivals, rivals_environment
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, free_memory, machine, records_path
from engine.ranks.device import DTYPES
from engine.settings.numerics import Numerics
from models.sizes import SIZES

OF_TRL = ("trl", "accelerate", "datasets", "pandas")
"""Modules that PPOTrainer imports and the project does not have."""


def compare(
    job: Job, device: torch.device, providers: list[str], effort: Effort, say: Say
) -> Iterator[dict[str, Any]]:
    """Yield the records of the providers, in order, beside ours where that came before.

    Who is missing, died, or did other work than ours is said and has no record.
    """
    one_by_one = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        write_weights(job, Path(folder), device)
        free_memory(device)  # a GPU's is the providers'
        openings = list(_openings(job, device, providers, Path(folder), say))
        ours: dict[str, Any] | None = None
        for record in run_in_turns(openings, effort, say, one_by_one=one_by_one):
            record["order"] = "one after the other" if one_by_one else "taking turns"
            if record["provider"] == "trident":
                ours = record
            elif ours:
                try:
                    record |= beside_ours(ours, record)
                except RuntimeError as error:
                    say(str(error))
                    continue
            yield record


def _openings(
    job: Job, device: torch.device, providers: list[str], weights: Path, say: Say
) -> Iterator[Opening]:
    fields = json.dumps(job_as_json(job))
    options = ("--job", fields, "--device", device.type, "--weights", str(weights))
    for name in providers:
        environment = dict(os.environ)
        if name.startswith("trl"):
            if missing := missing_rivals(*OF_TRL):
                say(f"{name} is left out: {missing}")
                continue
            environment = rivals_environment()
        command = (sys.executable, "-m", "benchmarks.ppo_provider", name, *options)
        yield lambda name=name, command=command, environment=environment: Provider(
            name, command, environment, say
        )


@mistakes_in_one_line()
def main() -> None:
    """Time the providers; print a table a workload and, with --out, append its records."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    where = machine(device, DTYPES[dtype])
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    effort = Effort(num_samples=arguments.num_samples, seconds=arguments.seconds)
    for workload in arguments.lengths or (WORKLOADS if device.type == "cpu" else ("fixed",)):
        job = _job(arguments, dtype, workload)
        records = []
        for record in compare(
            job,
            device,
            arguments.providers,
            effort,
            lambda line, workload=workload: console.print(f"{workload}, {line}", markup=False),
        ):
            records.append(record)
            if arguments.out:
                append_record(records_path(arguments.out, device), record | where)
        print_whole(console, table(job, records))
        for line in goal_lines(records, device.type):
            console.print(line)


def _job(arguments: argparse.Namespace, dtype: str, workload: str) -> Job:
    name = arguments.size or ("1.3b" if arguments.device == "cuda" else "small")
    return Job(
        size=SIZES[name],
        critic_size=SIZES[arguments.critic_size or name],
        numerics=Numerics(dtype=dtype, recompute=arguments.recompute),
        num_episodes=arguments.num_episodes,
        minibatch_size=arguments.minibatch_size,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens * (2 if workload == "mixed" else 1),
        pretraining_tokens=arguments.pretraining_tokens or _pretraining_tokens(arguments, name),
        ptx_examples_per_episode=arguments.ptx_examples_per_episode,
        micro_batch_tokens=arguments.micro_batch_tokens or MICRO_BATCH_TOKENS[arguments.device],
        workload=workload,
    )


def _pretraining_tokens(arguments: argparse.Namespace, name: str) -> int:
    """As long as the context, as the paper's; on a CPU as long as an episode of fixed lengths: our
    choice, to stay under four minutes."""
    if arguments.device == "cuda":
        return SIZES[name].context_length
    return arguments.prompt_tokens + arguments.response_tokens


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with one line where the options mean nothing."""
    check_minibatches(arguments.num_episodes, arguments.minibatch_size)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    name = arguments.size or ("1.3b" if arguments.device == "cuda" else "small")
    longest = arguments.prompt_tokens + 2 * arguments.response_tokens
    names = "--prompt-tokens and twice --response-tokens"
    check_context(names, longest, SIZES[name].context_length)
    if arguments.out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {arguments.out}: {error.strerror}")


def _parse() -> argparse.Namespace:
    parser = command("ppo_step")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: small, on a GPU 1.3b")
    parser.add_argument("--critic-size", choices=SIZES, help="default: the policy's")
    parser.add_argument(
        "--lengths", nargs="+", choices=WORKLOADS, help="default: both, on a GPU fixed"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32, on a GPU bf16")
    parser.add_argument("--num-episodes", type=count, default=64)
    parser.add_argument("--minibatch-size", type=count, default=16)
    parser.add_argument("--prompt-tokens", type=count, default=64)
    parser.add_argument(
        "--response-tokens",
        type=count,
        default=64,
        help="fixed: of a response; mixed: the longest has twice, the shortest a quarter as many",
    )
    parser.add_argument("--ptx-examples-per-episode", type=count_or_none, default=1)
    parser.add_argument(
        "--pretraining-tokens", type=count, help="default: an episode's, on a GPU the context's"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=count,
        help="of one forward pass, of every provider; default: 1024, on a GPU 8192",
    )
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--num-samples", type=count, default=3, help="iterations after the first")
    parser.add_argument(
        "--seconds", type=seconds, default=math.inf, help="of a provider; one iteration is counted"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        default=["trident", "trl", "trident, ptx"],
        help="in this order",
    )
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    arguments = parser.parse_args()
    _check(parser, arguments)
    return arguments


if __name__ == "__main__":
    main()
