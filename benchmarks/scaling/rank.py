"""What one of several ranks sends in a training step and in a rollout, at several sizes.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.scaling.rank FILE --sequences 8 16 32 64

Writes one JSON line for each degree of parallelism that takes all ranks (dp, tp, pp) and size, the
mean over the ranks; ranks.py starts it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.ppo_scene import NO_EOS, random_prompts
from benchmarks.real_job import ADAM
from benchmarks.scaling.traffic import Traffic
from engine.data.examples import Example
from engine.feed import pack_for
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import end_parallel, start_parallel
from engine.rollout import generate_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from engine.training.reduce import reduce_metrics
from models.sizes import GPTSize

SIZE = GPTSize(num_layers=4, hidden_size=64, num_heads=4, vocab_size=512, context_length=64)
LENGTH = 32
"""Tokens of a sequence."""
MICRO_BATCH_TOKENS = 64
PROMPT, RESPONSE = 8, 8
"""Tokens of a rollout's sequences."""
ITEMSIZE = 4
"""Bytes of a weight, gradient or activation: fp32."""


def layouts(num_ranks: int) -> dict[str, ParallelLayout]:
    """Return the layouts that use all ranks for one kind of parallelism."""
    return {
        "dp": ParallelLayout(),
        "tp": ParallelLayout(tp=num_ranks),
        "pp": ParallelLayout(pp=num_ranks),
    }


def step_traffic(parallel: Parallel, num_sequences: int) -> Traffic:
    """Return what this rank sends in a training step of the global batch."""
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    optimizer = Optimizer(network, ADAM, total_steps=1)
    tokens = np.random.default_rng(0).integers(0, SIZE.vocab_size, (num_sequences, LENGTH))
    examples = [Example(tokens=row, prompt_length=1) for row in tokens]
    batches = pack_for(examples[:num_sequences], parallel, MICRO_BATCH_TOKENS)
    loss = NegativeLogLikelihood(num_sequences * (LENGTH - 1))
    with Traffic() as traffic:
        optimizer.zero_gradients()
        found = forward_backward(network, batches, loss)
        optimizer.step(0)
        reduce_metrics(found, parallel)
    return traffic


def rollout_traffic(parallel: Parallel, num_sequences: int) -> Traffic:
    """Return what this rank sends in a rollout of so many responses of all ranks."""
    network = build_network("language", SIZE, parallel, numerics=Numerics())
    prompts = random_prompts(SIZE, num_sequences, PROMPT)
    sampling = SamplingConfig(max_new_tokens=RESPONSE, num_slots=16, cache_gib=0.01)
    with Traffic() as traffic:
        generate_rollout(network, prompts, sampling, eos_id=NO_EOS, seed=0, first_sample_index=0)
    return traffic


def measure(parallel: Parallel, num_sequences: int) -> dict[str, dict[str, Any]]:
    """Return the means over the ranks, of each job."""
    jobs: dict[str, Callable[[Parallel, int], Traffic]] = {
        "training step": step_traffic,
        "rollout": rollout_traffic,
    }
    found = {}
    for job, run in jobs.items():
        mine = run(parallel, num_sequences)
        row = {
            "bytes": mine.num_bytes,
            "calls": mine.num_calls,
            "alone": mine.num_alone,
            **{f"{name} bytes": value for name, value in mine.by_operation.items()},
        }
        rows: list[dict[str, float]] = [{}] * parallel.world_size
        dist.all_gather_object(rows, row)
        names = sorted({name for each in rows for name in each})
        found[job] = {n: sum(r.get(n, 0) for r in rows) / len(rows) for n in names}
    return found


@mistakes_in_one_line()
def main() -> None:
    """Measure all layouts and sizes; the first rank writes them."""
    parser = command("scaling.rank")
    parser.add_argument("file", type=Path)
    parser.add_argument("--sequences", type=count, nargs="+", required=True)
    arguments = parser.parse_args()
    lines = []
    num_ranks = start_parallel(ParallelLayout(), seed=0).world_size
    for kind, layout in layouts(num_ranks).items():
        parallel = start_parallel(layout, seed=0)
        for num_sequences in arguments.sequences:
            for job, values in measure(parallel, num_sequences).items():
                row = {"layout": kind, "ranks": num_ranks, "sequences": num_sequences, "job": job}
                lines.append(json.dumps(row | values))
    if parallel.is_writer:
        arguments.file.write_text("\n".join(lines) + "\n")
    end_parallel()


if __name__ == "__main__":
    main()
