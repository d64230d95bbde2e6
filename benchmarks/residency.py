"""Measures what residency saves in memory and costs in time: one PPO iteration with all weights and
optimizer state on the GPU, and the same with all that can rest in pinned host memory there.

    python -m benchmarks.residency --device cuda --size 1.3b --out benchmarks/results
    python -m benchmarks.residency --device cpu --size tiny

Peak memory is torch's allocator's, key-value cache and activations included; on a CPU it is the sum
of weights, gradients and optimizer state. A swap is a round trip: reference in, policy out and in
again, reward model and critic likewise. Its rate counts what arrives on the GPU, beside the rate of
one plain copy of pinned memory. Hidden is the part of the swaps' time that scoring does not take
longer with them.
"""

import argparse
import dataclasses
import gc
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import append_record, machine, records_path, time_calls, wall_clock
from engine.advantages import estimate_advantages
from engine.data.examples import Example
from engine.ema import EMA
from engine.network import Kind, Network, build_network
from engine.optimizer import Optimizer
from engine.parallel import Parallel, start_parallel
from engine.ppo import Learner, update
from engine.residency.expected import PHASES
from engine.residency.residency import Residency
from engine.rollout import Rollout, generate_rollout, score_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES, GPTSize

NO_EOS = -1
CHOICES = {
    "resident": ResidencyConfig(),
    "host": ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host"),
}


@dataclass(kw_only=True)
class Scene:
    """Four models of one size under a residency."""

    residency: Residency
    learner: Learner
    reference: Network
    reward_model: Network


def build(config: PPOConfig, size: GPTSize, parallel: Parallel) -> Scene:
    """Return freshly initialised models; each frozen one starts as its partner does."""

    def make(kind: Kind) -> Network:
        return build_network(kind, size, parallel, numerics=config.numerics)

    def load(kind: Kind, into: Network | None) -> Network:
        if into is None:
            return make(kind)
        into.weights_version += 1  # they are in the partner's memory already
        return into

    policy, critic = (
        Optimizer(make(kind), adam, total_steps=config.iterations)
        for kind, adam in (("language", config.adam), ("scalar", config.critic_adam))
    )
    learner = Learner(
        policy=policy, critic=critic, ema=EMA(policy, config.ema_decay), pretraining=None
    )
    residency = Residency(config.residency, policy=policy, critic=critic, ema=learner.ema)
    return Scene(
        residency=residency,
        learner=learner,
        reference=residency.frozen("reference", size, lambda into: load("language", into)),
        reward_model=residency.frozen("reward_model", size, lambda into: load("scalar", into)),
    )


def run_iteration(
    scene: Scene, config: PPOConfig, prompts: list[Example], step: int
) -> tuple[Rollout, dict[str, float]]:
    """Return the rollout of one iteration with one update, and the seconds of its phases."""
    learner, residency = scene.learner, scene.residency
    policy, critic = learner.policy.network, learner.critic.network
    clock = wall_clock(policy.parallel.device)
    made: list[Rollout] = []

    def rollout() -> None:
        with residency.rollout():
            made.append(
                generate_rollout(
                    policy, prompts, config.sampling, eos_id=NO_EOS, seed=0, first_sample_index=0
                )
            )

    def score() -> None:
        with residency.score():
            score_rollout(
                made[0],
                policy=policy,
                reference=scene.reference,
                critic=critic,
                reward_model=scene.reward_model,
                temperature=1.0,
                micro_batch_tokens=config.micro_batch_tokens,
                eos_rule="none",
                eos_penalty=0.0,
            )

    def train() -> None:
        _, whitening = estimate_advantages(
            made[0], kl_coef=0.02, kl_estimator="k1", gamma=1.0, lam=0.95, whiten=True
        )
        with residency.update():
            update(learner, config, made[0].examples(), whitening, step=step)

    calls = {"rollout": rollout, "score": score, "update": train}
    seconds = {phase: clock(call) / 1e3 for phase, call in calls.items()}
    return made[0], seconds


def swap_seconds(scene: Scene, num_samples: int) -> float:
    """Return the time of both pairs' swaps with nothing beside them."""
    policy, critic = scene.learner.policy.network, scene.learner.critic.network

    def swap() -> None:
        for owner, guest in ((policy, scene.reference), (critic, scene.reward_model)):
            with owner.present():
                owner.weights_version += 1  # as after an update: it is copied out anew
            with guest.present():
                pass

    clock = wall_clock(policy.parallel.device)
    swap()
    return time_calls({"swap": swap}, clock, num_samples=num_samples)["swap"].median_ms / 1e3


def link_bandwidth(device: torch.device, *, num_bytes: int) -> float:
    """Return the bytes a second that one copy from pinned host memory to the device moves."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    calls = {"copy": lambda: there.copy_(host, non_blocking=True)}
    calls["copy"]()
    return num_bytes / (time_calls(calls, wall_clock(device))["copy"].median_ms / 1e3)


def measure(
    choice: str, config: PPOConfig, size: GPTSize, parallel: Parallel, num_samples: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return one choice's record, and the first rollout's numbers, which all choices share."""
    rng = np.random.default_rng(0)
    length = size.context_length // 8
    prompts = [
        Example(tokens=rng.integers(0, size.vocab_size, length), prompt_length=length)
        for _ in range(config.rollout_batch_size)
    ]
    scene = build(dataclasses.replace(config, residency=CHOICES[choice]), size, parallel)
    rollout, _ = run_iteration(scene, config, prompts, 0)  # compiles, allocates
    numbers = torch.stack([rollout.ref_logprobs, rollout.values]).cpu()
    runs = [run_iteration(scene, config, prompts, step + 1)[1] for step in range(num_samples)]
    ledger = scene.residency.ledger
    record: dict[str, Any] = {"benchmark": "residency", "provider": choice}
    for phase in PHASES:
        record[f"{phase}_s"] = statistics.median(seconds[phase] for seconds in runs)
        record[f"{phase}_peak_bytes"] = ledger.measured.get(phase, ledger.peaks[phase])
    record["host_bytes"] = ledger.metrics()["memory/host_bytes"]
    if choice == "host":
        record["swap_s"] = swap_seconds(scene, num_samples)
        networks = (scene.learner.policy.network, scene.learner.critic.network)
        parameters = [p for n in networks for m in n.modules for p in m.parameters()]
        record["swap_bytes"] = 2 * sum(p.nbytes for p in parameters)  # each memory is filled twice
    return record, numbers


def main() -> None:
    """Measure both choices; print tables and, with --out, append records."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    size = SIZES[arguments.size or ("1.3b" if on_gpu else "tiny")]
    config = PPOConfig(
        rollout_batch_size=arguments.batch,
        minibatch_size=arguments.batch,
        micro_batch_tokens=arguments.micro_batch_tokens,
        ptx_coef=0.0,
        numerics=Numerics(dtype="bf16" if on_gpu else "fp32"),
        sampling=SamplingConfig(max_new_tokens=arguments.response_tokens, num_slots=64),
    )
    where = machine(device)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    parallel = start_parallel(ParallelLayout(), seed=0)
    link = link_bandwidth(device, num_bytes=2**30 if on_gpu else 2**22)
    records, numbers = [], []
    for choice in CHOICES:  # one after the other: both at once would not fit
        record, seen = measure(choice, config, size, parallel, arguments.num_samples)
        records.append(record)
        numbers.append(seen)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if not torch.equal(*numbers):
        raise RuntimeError("the choices differ in reference log-probs or values: one is wrong")
    resident, host = records
    slower = host["score_s"] - resident["score_s"]
    host["hidden_fraction"] = min(1.0, max(0.0, 1.0 - slower / host["swap_s"]))
    host["swap_bytes_per_s"] = host["swap_bytes"] / host["swap_s"]
    host["link_bytes_per_s"] = link
    console.print(f"{size}, {arguments.batch} responses of {arguments.response_tokens} tokens")
    console.print(_table(records))
    console.print(
        f"swap {host['swap_s']:.3f} s, {host['swap_bytes_per_s'] / 1e9:.1f} GB/s; link "
        f"{link / 1e9:.1f} GB/s; hidden {host['hidden_fraction']:.0%}"
    )
    if arguments.out:
        shape = {"size": dataclasses.asdict(size), "batch": arguments.batch}
        shape["response_tokens"] = arguments.response_tokens
        for record in records:
            append_record(records_path(arguments.out, device), record | shape | where)


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=SIZES, help="default: tiny, on a GPU 1.3b")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4, help="responses")
    parser.add_argument(
        "--response-tokens", type=int, default=512 if on_gpu else 16, help="of each response"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--num-samples", type=int, default=3, help="iterations measured")
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
