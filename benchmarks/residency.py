"""Measures what residency saves in memory and costs in time: PPO iterations with all weights and
optimizer state on the GPU, and with some of it in pinned host memory while nobody reads it.

    python -m benchmarks.residency --device cuda --size 1.3b --out benchmarks/results
    python -m benchmarks.residency --device cuda --quick --out benchmarks/results
    python -m benchmarks.residency --device cpu --size tiny

The swap comes first: a round trip of reference in, policy out and in again, reward model and critic
likewise. Its rate counts what arrives on the GPU, beside the rate of one plain copy of pinned
memory. Hidden is the part of the swaps' time that scoring does not take longer with them.

"frozen" has reference and reward model in host memory, "host" critic and optimizer state besides,
which takes half a minute to pin at 1.3B: --quick leaves it out. Peak memory is torch's allocator's,
key-value cache and activations included; on a CPU it is the sum of weights, gradients and optimizer
state. At 1.3B in bf16 "resident" has 58 GB of weights, gradients, masters, moments and average, and
15 GB of activations at 8192 tokens a pass; "host" pins 37 GB of state and 11 GB of weights.
"""

import argparse
import dataclasses
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.ppo_scene import Scene, build, random_prompts, run_iteration
from benchmarks.screen import print_whole, screen
from benchmarks.timing import (
    append_record,
    free_memory,
    machine,
    records_path,
    time_calls,
    wall_clock,
)
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.residency.expected import PHASES
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES, GPTSize, size_as_json

CHOICES = {
    "frozen": ResidencyConfig(reference="host", reward_model="host"),
    "resident": ResidencyConfig(),
    "host": ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host"),
}


def swap_seconds(scene: Scene, num_samples: int) -> float:
    """Return the time of both pairs' swaps with nothing beside them."""
    policy, critic = scene.learner.policy.network, scene.learner.critic.network

    def swap() -> None:
        for owner, guest in ((policy, scene.reference), (critic, scene.reward_model)):
            with owner.present():
                owner.mark_changed()  # as after an update: it is copied out anew
            with guest.present():
                pass

    clock = wall_clock(policy.parallel.device)
    swap()
    return time_calls({"swap": swap}, clock, num_samples=num_samples)["swap"].median_ms / 1e3


def link_bandwidth(device: torch.device, *, num_bytes: int, both_ways: bool = False) -> float:
    """Return the bytes a second that one copy from pinned host memory to the device moves, alone or
    while as many leave it."""
    is_cuda = device.type == "cuda"
    hosts = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    there = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    outward = torch.cuda.Stream(device) if is_cuda and both_ways else None

    def copy() -> None:
        if outward:
            with torch.cuda.stream(outward):
                hosts[1].copy_(there[1], non_blocking=True)
        there[0].copy_(hosts[0], non_blocking=True)

    copy()
    return num_bytes / (time_calls({"copy": copy}, wall_clock(device))["copy"].median_ms / 1e3)


def measure_swap(scene: Scene, device: torch.device, num_samples: int) -> dict[str, Any]:
    """Return the record of the swaps of a scene whose frozen models rest on the host."""
    seconds = swap_seconds(scene, num_samples)
    networks = (scene.learner.policy.network, scene.learner.critic.network)
    parameters = [p for n in networks for m in n.modules for p in m.parameters()]
    num_bytes = 2 * sum(p.nbytes for p in parameters)  # each memory is filled twice
    link_bytes = 2**30 if device.type == "cuda" else 2**22
    link = link_bandwidth(device, num_bytes=link_bytes)
    return {
        "benchmark": "residency",
        "provider": "swap",
        "swap_s": seconds,
        "swap_bytes": num_bytes,
        "swap_bytes_per_s": num_bytes / seconds,
        "link_bytes_per_s": link,
        "link_both_ways_bytes_per_s": link_bandwidth(device, num_bytes=link_bytes, both_ways=True),
        "link_share": num_bytes / seconds / link,
        "num_samples": num_samples,
    }


def measure_iterations(
    scene: Scene, config: PPOConfig, size: GPTSize, num_samples: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the record of a scene's phases, and the first rollout's scores, which all choices
    share."""
    prompts = random_prompts(size, config.rollout_batch_size, size.context_length // 8)
    first = run_iteration(scene, config, prompts, 0).scored  # compiles, allocates
    numbers = torch.stack([first.ref_logprobs, first.values]).cpu()
    runs = [run_iteration(scene, config, prompts, n + 1).seconds for n in range(num_samples)]
    ledger = scene.residency.ledger
    record: dict[str, Any] = {"benchmark": "residency", "num_samples": num_samples}
    for phase in PHASES:
        record[f"{phase}_s"] = statistics.median(seconds[phase] for seconds in runs)
        record[f"{phase}_peak_bytes"] = ledger.measured.get(phase, ledger.peaks[phase])
    record["host_bytes"] = ledger.metrics()["memory/host_bytes"]
    return record, numbers


def measure(
    config: PPOConfig,
    size: GPTSize,
    parallel: Parallel,
    choices: list[str],
    num_samples: int,
    publish: Callable[[dict[str, Any]], None],
) -> None:
    """Publish each record as it is there: the swap, the choices, and what of the swap is hidden.

    choices: "frozen", then "resident", then others. Raises RuntimeError where one gives other
    reference log-probs or values than the first.
    """
    device = parallel.device
    swap: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    numbers = None
    for choice in choices:  # one after the other: two at once would not fit
        free_memory(device)
        config = dataclasses.replace(config, residency=CHOICES[choice])
        scene = build(config, (size, size), parallel)
        if choice == "frozen":
            swap = measure_swap(scene, device, max(5, num_samples))
            publish(swap)
        record, seen = measure_iterations(scene, config, size, num_samples)
        del scene
        numbers = seen if numbers is None else numbers
        if not torch.equal(numbers, seen):
            raise RuntimeError(f"{choice} differs in reference log-probs or values: one is wrong")
        found[choice] = record | {"provider": choice}
        publish(found[choice])
        if choice == "resident":
            publish(_hidden(swap, found["frozen"], found["resident"]))


def _hidden(
    swap: dict[str, Any], frozen: dict[str, Any], resident: dict[str, Any]
) -> dict[str, Any]:
    """Return the record of what the swaps add to scoring."""
    slower = frozen["score_s"] - resident["score_s"]
    return {
        "benchmark": "residency",
        "provider": "hidden",
        "score_slower_s": slower,
        "swap_s": swap["swap_s"],
        "hidden_fraction": min(1.0, max(0.0, 1.0 - slower / swap["swap_s"])),
    }


@mistakes_in_one_line()
def main() -> None:
    """Measure; print tables and, with --out, append each record as it is there."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    size = SIZES[arguments.size or ("1.3b" if on_gpu else "tiny")]
    batch = arguments.batch or (64 if on_gpu else 4)
    full_length = 512 if on_gpu else 16
    length = arguments.response_tokens or (full_length // 2 if arguments.quick else full_length)
    config = PPOConfig(
        rollout_batch_size=batch,
        minibatch_size=batch,
        micro_batch_tokens=arguments.micro_batch_tokens,
        ptx_coef=0.0,
        numerics=Numerics(dtype="bf16" if on_gpu else "fp32"),
        sampling=SamplingConfig(max_new_tokens=length, num_slots=64, prefill_tokens=2**14),
    )
    where = machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    console.print(f"{size}, {batch} responses of {length} tokens")
    shape = {"size": size_as_json(size), "batch": batch, "response_tokens": length}
    records: list[dict[str, Any]] = []

    def publish(record: dict[str, Any]) -> None:
        records.append(record)
        if arguments.out:
            append_record(records_path(arguments.out, device), record | shape | where)
        if record["provider"] == "swap":
            console.print(
                f"swap {record['swap_s']:.3f} s, {record['swap_bytes_per_s'] / 1e9:.1f} GB/s, "
                f"{record['link_share']:.0%} of the link's {record['link_bytes_per_s'] / 1e9:.1f}"
            )
        elif record["provider"] == "hidden":
            console.print(f"hidden {record['hidden_fraction']:.0%}")

    choices = [name for name in CHOICES if not (arguments.quick and name == "host")]
    parallel = start_parallel(ParallelLayout(), seed=0)
    num_samples = arguments.num_samples or (1 if arguments.quick else 3)
    measure(config, size, parallel, choices, num_samples, publish)
    print_whole(console, _table([record for record in records if record["provider"] in CHOICES]))


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table("weights and state", *(f"{p} s" for p in PHASES), title="seconds and peak MiB")
    for phase in PHASES:
        table.add_column(f"{phase} MiB")
    table.add_column("host MiB")
    for record in records:
        table.add_row(
            record["provider"],
            *(f"{record[f'{phase}_s']:.3f}" for phase in PHASES),
            *(f"{record[f'{phase}_peak_bytes'] / 2**20:.1f}" for phase in PHASES),
            f"{record['host_bytes'] / 2**20:.1f}",
        )
    return table


def _parse() -> argparse.Namespace:
    parser = command("residency")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: tiny, on a GPU 1.3b")
    parser.add_argument("--quick", action="store_true", help="the swap, and one short iteration")
    parser.add_argument("--batch", type=count, help="responses; default: 4, on a GPU 64")
    parser.add_argument(
        "--response-tokens", type=count, help="default: 16, on a GPU 512; quick half"
    )
    parser.add_argument("--micro-batch-tokens", type=count, default=8192)
    parser.add_argument(
        "--num-samples", type=count, help="iterations measured; default: 3, quick 1"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
