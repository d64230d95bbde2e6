"""Compares the planner with what a training step and a PPO iteration take on this device.

    python -m benchmarks.plan_accuracy --device cpu --size tiny
    python -m benchmarks.plan_accuracy --device cuda --size 1.3b --out benchmarks/results

The planner is given this device: FLOP/s of a large matrix product, bytes/s of a copy and bytes of
memory, all measured first; its assumptions about what share of them is reached stay as they are.
Weights, gradients and optimizer state must agree to the byte, padding of buffers aside.
"""

import argparse
import dataclasses
import itertools
import warnings
from pathlib import Path

import psutil
import torch
from rich.table import Table

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.language_step import Job, trident
from benchmarks.ppo_job import Effort
from benchmarks.ppo_job import Job as Iteration
from benchmarks.ppo_provider import measure
from benchmarks.ppo_trident import config_of
from benchmarks.screen import print_whole, screen
from benchmarks.timing import (
    append_record,
    copy_bandwidth,
    device_name,
    machine,
    matmul_flops,
    peak_bytes,
    records_path,
    tensor_bytes,
    time_calls,
    wall_clock,
)
from engine.planning.hardware import GPU, Cluster
from engine.planning.plan import plan
from engine.planning.workload import Workload
from engine.ranks.device import DTYPES
from engine.settings.numerics import Numerics
from engine.settings.sft import SFTConfig, SFTData
from models.sizes import SIZES, size_as_json

Rows = list[tuple[str, float, float]]
"""(what, planned, measured)."""


def measured_cluster(device: torch.device, dtype: torch.dtype) -> Cluster:
    """Return this device as the planner sees GPUs: what a matrix product and a copy reach here."""
    bandwidth = copy_bandwidth(device)
    gpu = GPU(
        flops=matmul_flops(device, dtype),
        memory_bytes=_memory_bytes(device),
        memory_bandwidth=bandwidth,
        nvlink_bandwidth=bandwidth,  # one device: nothing is sent
        network_bandwidth=bandwidth,
        host_bandwidth=bandwidth,
        host_memory_bytes=psutil.virtual_memory().total,
        dollars_per_hour=0.0,
    )
    return Cluster(gpu=gpu, gpu_name=device_name(device), num_gpus=1)


def train_rows(job: Job, name: str, cluster: Cluster, device: torch.device) -> Rows:
    """Return what a language-model step of a named size takes, planned and measured."""
    config = SFTConfig(
        size=name,
        data=SFTData(pretraining=Path("text"), pretraining_tokens=job.length),
        batch_size=job.num_sequences,
        micro_batch_tokens=job.micro_batch_tokens,
        dropout=0.0,
        numerics=job.numerics,
    )
    planned = plan(config, cluster)
    held = planned.fullest.phases["train"]
    trainer = trident(job, device, None)
    trainer.step()
    state = trainer.state()
    weights, gradients = tensor_bytes(state["weights"]), tensor_bytes(state["gradients"])
    everything = tensor_bytes(itertools.chain(*state.values()))  # fp32 weights are their masters
    timing = time_calls({"step": trainer.step}, wall_clock(device), num_samples=5)["step"]
    return [
        ("weights, bytes", held["weights"], weights),
        ("gradients, bytes", held["gradients"], gradients),
        (
            "masters and moments, bytes",
            held["fp32 masters"] + held["Adam moments"],
            everything - weights - gradients,
        ),
        (
            "activations and workspace, bytes",
            held["activations"] + held["workspace"],
            peak_bytes(trainer.step, device),
        ),
        ("training step, seconds", planned.step_seconds, timing.median_ms / 1e3),
    ]


def ppo_rows(job: Iteration, name: str, cluster: Cluster, device: torch.device) -> Rows:
    """Return the seconds of the phases of a PPO iteration, planned and measured."""
    config = dataclasses.replace(config_of(job, 1), size=name, reward_model_size=name)
    workload = Workload(prompt_tokens=job.prompt_tokens, response_tokens=job.response_tokens)
    planned = {
        phase.name: sum(phase.seconds.values()) for phase in plan(config, cluster, workload).phases
    }
    measured = measure(job, device, Effort(num_samples=2), provider="trident, ptx")["phase_s"]
    return [(f"{phase}, seconds", planned[phase], measured[phase]) for phase in planned]


@mistakes_in_one_line()
def main() -> None:
    """Plan, measure, and print both; with --out, append a record."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    where = machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    name = arguments.size or ("tiny" if device.type == "cpu" else "1.3b")
    size = SIZES[name]
    numerics = Numerics(dtype="fp32" if device.type == "cpu" else "bf16")
    cluster = measured_cluster(device, DTYPES[numerics.dtype])
    step = Job(
        size=size,
        numerics=numerics,
        num_sequences=arguments.num_sequences,
        length=size.context_length,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    rows = train_rows(step, name, cluster, device)
    if not arguments.no_ppo:
        iteration = Iteration(
            size=size,
            critic_size=size,
            numerics=numerics,
            num_episodes=arguments.num_episodes,
            minibatch_size=arguments.num_episodes // 4,
            prompt_tokens=64,
            response_tokens=64,
            pretraining_tokens=size.context_length,
            ptx_examples_per_episode=1,
            micro_batch_tokens=arguments.micro_batch_tokens,
        )
        rows += ppo_rows(iteration, name, cluster, device)
    print_whole(console, _table(name, cluster, rows))
    if arguments.out:
        record = {
            "benchmark": "plan_accuracy",
            "size": size_as_json(size),
            "numerics": dataclasses.asdict(numerics),
            "cluster": dataclasses.asdict(cluster),
            "rows": {what: {"planned": p, "measured": m} for what, p, m in rows},
        }
        append_record(records_path(arguments.out, device), record | where)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _table(name: str, cluster: Cluster, rows: Rows) -> Table:
    title = (
        f"{name} on {cluster.gpu.flops / 1e12:.2f} TFLOP/s, "
        f"{cluster.gpu.memory_bandwidth / 1e9:.0f} GB/s, both measured"
    )
    table = Table("", "planned", "measured", "planned / measured", title=title)
    for what, planned, measured in rows:
        cells = [
            f"{value:,.0f}" if what.endswith("bytes") else f"{value:.4f}"
            for value in (planned, measured)
        ]
        table.add_row(what, *cells, f"{planned / measured:.3f}")
    return table


def _parse() -> argparse.Namespace:
    parser = command("plan_accuracy")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: tiny, on a GPU 1.3b")
    parser.add_argument("--num-sequences", type=count, default=16, help="of a step, whole contexts")
    parser.add_argument("--num-episodes", type=count, default=64, help="of a PPO iteration")
    parser.add_argument("--micro-batch-tokens", type=count, default=8192)
    parser.add_argument("--no-ppo", action="store_true", help="the training step only")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
