"""Times an iteration of PPO-ptx by its phases: rollout, score, advantage, update.

    python -m benchmarks.ppo_step --device cpu --size tiny
    python -m benchmarks.ppo_step --device cuda --size 1.3b --out benchmarks/results

engine.ppo.train itself runs, on random weights and prompts of words without meaning: such a policy
hardly ever ends a response, so nearly all have the full number of tokens. The first iteration warms
up and is not counted.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import random
import resource
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import append_record, machine, records_path
from engine.checkpoint import Checkpointer
from engine.data.tokenizer import END_OF_TEXT, load_tokenizer
from engine.metrics import read_metrics
from engine.network import Kind, build_network
from engine.parallel import start_parallel
from engine.ppo import train
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES, GPTSize

PHASES = ("rollout", "score", "advantage", "update")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One iteration, its lengths in tokens."""

    size: GPTSize
    critic_size: GPTSize
    numerics: Numerics
    num_episodes: int
    minibatch_size: int
    prompt_tokens: int
    response_tokens: int
    pretraining_tokens: int
    ptx_examples_per_episode: int
    micro_batch_tokens: int


def write_files(folder: Path, job: Job) -> None:
    """Write a tokenizer of one word a token, prompts, pretraining text and random checkpoints."""
    draw = random.Random(0)
    num_words = job.size.vocab_size - 1

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(num_words)}" for _ in range(count))

    words = {f"w{n}": n for n in range(num_words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(job.num_episodes):
            file.write(json.dumps({"prompt": text(job.prompt_tokens)}) + "\n")
    num_examples = job.ptx_examples_per_episode * job.minibatch_size
    with (folder / "pretraining.jsonl").open("w") as file:
        for _ in range(num_examples):
            file.write(json.dumps({"text": text(job.pretraining_tokens)}) + "\n")
    _write_checkpoint(folder / "policy", "policy", "language", job.size, job.numerics)
    _write_checkpoint(folder / "rm", "reward_model", "scalar", job.critic_size, job.numerics)


def _write_checkpoint(run: Path, role: str, kind: Kind, size: GPTSize, numerics: Numerics) -> None:
    parallel = start_parallel(ParallelLayout(), seed=0)
    tokenizer = load_tokenizer(run.parent / "tokenizer.json")
    Checkpointer(
        directory=run / "checkpoints",
        parallel=parallel,
        networks={role: build_network(kind, size, parallel, numerics=numerics)},
        optimizers={},
        tokenizer_fingerprint=tokenizer.fingerprint(),
    ).save(0, {})
    tokenizer.save(run / "tokenizer")


def config_of(job: Job, folder: Path, num_iterations: int) -> PPOConfig:
    """Return PPO-ptx with the paper's coefficients over the files of `folder`."""
    return PPOConfig(
        directory=folder / "ppo",
        policy=folder / "policy",
        reward_model=folder / "rm",
        data=PPOData(
            prompts=folder / "prompts.jsonl",
            pretraining=folder / "pretraining.jsonl",
            pretraining_tokens=job.pretraining_tokens,
            max_prompt_tokens=job.prompt_tokens,
        ),
        sampling=SamplingConfig(
            max_new_tokens=job.response_tokens, num_slots=min(job.num_episodes, 256)
        ),
        iterations=num_iterations,
        rollout_batch_size=job.num_episodes,
        minibatch_size=job.minibatch_size,
        ptx_examples_per_episode=job.ptx_examples_per_episode,
        micro_batch_tokens=job.micro_batch_tokens,
        numerics=job.numerics,
        num_shown=0,
    )


def measure(job: Job, device: torch.device, num_samples: int) -> dict[str, Any]:
    """Return the record of this engine: medians over `num_samples` iterations after the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, job)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.redirect_stdout(io.StringIO()):
            train(config_of(job, folder, num_samples + 1))
        rows = read_metrics(folder / "ppo")[1:]
    seconds = [sum(row[f"{phase}/seconds"] for phase in PHASES) for row in rows]
    median = statistics.median(seconds)
    return {
        "benchmark": "ppo_step",
        "provider": "trident",
        "median_s": median,
        "num_samples": len(rows),
        "phase_s": {
            phase: statistics.median(row[f"{phase}/seconds"] for row in rows) for phase in PHASES
        },
        "episodes_per_s": job.num_episodes / median,
        "response_tokens": statistics.mean(row["rollout/response_tokens"] for row in rows),
        "peak_bytes": _peak_bytes(device),
        "job": dataclasses.asdict(job),
    }


def rival() -> str:
    """Return why TRL's PPO does not stand beside ours."""
    try:
        version = importlib.import_module("trl").__version__
    except ImportError:
        return "TRL is not installed: left out"
    for module in ("trl", "trl.experimental.ppo"):
        with contextlib.suppress(ImportError, RuntimeError):
            if hasattr(importlib.import_module(module), "PPOTrainer"):
                return f"TRL {version} has a PPO trainer; this script does not run it: left out"
    return f"TRL {version} has no PPO trainer: left out"


def main() -> None:
    """Time iterations; print a table and, with --out, append a record."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    where = machine(device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    name = arguments.size or ("tiny" if device.type == "cpu" else "1.3b")
    on_gpu = device.type == "cuda"
    job = Job(
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
    record = measure(job, device, arguments.num_samples)
    record["rival"] = rival()
    console.print(_table(job, record))
    console.print(record["rival"])
    if arguments.out:
        append_record(records_path(arguments.out, device), record | where)


def _peak_bytes(device: torch.device) -> int:
    """Most memory of the device that torch gave out; on a CPU the most the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(job: Job, record: dict[str, Any]) -> Table:
    title = (
        f"{job.num_episodes} episodes of {job.prompt_tokens} + {job.response_tokens} tokens, "
        f"minibatches of {job.minibatch_size}, {job.ptx_examples_per_episode} x "
        f"{job.pretraining_tokens} tokens of pretraining text an episode"
    )
    table = Table("provider", *PHASES, "seconds", "episodes/s", "peak GB", title=title)
    table.add_row(
        record["provider"],
        *(f"{record['phase_s'][phase]:.3f}" for phase in PHASES),
        f"{record['median_s']:.3f}",
        f"{record['episodes_per_s']:.2f}",
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
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
