"""What a pure decoding step takes: the difference of two runs that share all but their last tokens.

Both runs prefill the same prompts, all in one step, and decode a few tokens; the longer one goes on
for NUM_STEPS. Prefill, graph captures and whatever else a call does once are in both, and cancel.
The bound of a step is the time to read the weights and the keys and values of all contexts once.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.table import Table

from benchmarks.timing import num_host_syncs, summary, wall_clock
from engine.generation.generate import generate
from engine.generation.graphs import CudaGraph
from engine.generation.scheduler import Counts
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from models.sizes import GPTSize

NUM_SHORT = 17
"""Tokens of the shorter run: one from the prompt, then two looks of the host of 8 steps each."""
NUM_STEPS = 128
"""Steps that the longer run has more; 16 looks of the host."""
NO_EOS = -1

Run = Callable[[int], object]
"""Answers all prompts with that many tokens each."""


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Prompts [n, p] whose contexts have `context` tokens in the middle of the steps timed."""

    size: GPTSize
    batch: int
    context: int
    num_steps: int = NUM_STEPS

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt."""
        return self.context - NUM_SHORT - self.num_steps // 2

    @property
    def num_long(self) -> int:
        """Tokens of the longer run."""
        return NUM_SHORT + self.num_steps

    def prompts(self) -> list[np.ndarray]:
        """Return random prompts, the same at every call."""
        shape = (self.batch, self.prompt_tokens)
        return list(np.random.default_rng(0).integers(0, self.size.vocab_size, shape))

    def sampling(self, *, cuda_graphs: bool, temperature: float = 1.0) -> SamplingConfig:
        """Return a slot for every prompt, and one step for all prompts."""
        return SamplingConfig(
            temperature=temperature,
            num_slots=self.batch,
            prefill_tokens=self.batch * self.prompt_tokens,
            cuda_graphs=cuda_graphs,
        )

    def bound_ms(self, itemsize: int, bandwidth: float) -> float:
        """Return the time of a step that reads weights and contexts once, on average over the steps
        timed. bandwidth: bytes a second, read."""
        size = self.size
        # The step that feeds answer token i, counted from 1, reads the keys up to its own.
        mean_context = self.prompt_tokens + (2 * NUM_SHORT + self.num_steps - 1) / 2
        cache = self.batch * mean_context * 2 * size.num_layers * size.hidden_size
        return (size.num_parameters + cache) * itemsize / bandwidth * 1e3


@dataclass
class Captures:
    """CUDA graphs that were captured, and the seconds that took."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def counting_captures(graph_class: Any = CudaGraph) -> Iterator[Captures]:
    """Run a block and count the graphs recorded in it; their seconds include the run before."""
    found, record = Captures(), graph_class.__init__

    def counted(self: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        record(self, *arguments)
        found.count += 1
        found.seconds += time.perf_counter() - start

    with mock.patch.object(graph_class, "__init__", counted):
        yield found


def answers(
    network: Network, job: Decode, config: SamplingConfig, num_tokens: int
) -> tuple[np.ndarray, Counts]:
    """Return the answers [n, num_tokens] in the prompts' order, and what generation did."""
    counts = Counts()
    config = dataclasses.replace(config, max_new_tokens=num_tokens)
    responses = generate(network, job.prompts(), config, eos_id=NO_EOS, seed=0, counts=counts)
    tokens = {response.sample_index: response.tokens for response in responses}
    return np.stack([tokens[index] for index in range(job.batch)]), counts


def agreement(network: Network, job: Decode) -> float:
    """Return how much of the greedy answers with and without CUDA graphs is the same: tokens before
    an answer's first difference. In fp32 it should be all."""
    graphs, eager = (
        answers(network, job, job.sampling(cuda_graphs=choice, temperature=0.0), job.num_long)[0]
        for choice in (True, False)
    )
    return float(np.logical_and.accumulate(graphs == eager, axis=1).mean())


def measure_trident(
    network: Network, job: Decode, bandwidth: float, num_samples: int
) -> list[dict[str, Any]]:
    """Return the records of decoding with and without CUDA graphs, taking turns."""
    device = network.parallel.device
    choices = {"trident": True, "trident, eager": False}
    configs = {name: job.sampling(cuda_graphs=choice) for name, choice in choices.items()}
    notes: dict[str, dict[str, Any]] = {name: {} for name in configs}
    runs: dict[str, Run] = {}
    for name, config in configs.items():
        runs[name] = lambda num_tokens, config=config: answers(network, job, config, num_tokens)
        for when in ("first", "next"):
            with counting_captures() as captures:
                runs[name](NUM_SHORT)
            notes[name][f"{when}_call_captures"] = captures.count
            notes[name][f"{when}_call_capture_s"] = captures.seconds
    _check_steps(network, job, configs["trident"])
    records = measure(runs, job, network.dtype.itemsize, bandwidth, device, num_samples)
    share = agreement(network, job)
    for record in records:
        record |= notes[record["provider"]] | {"greedy_same_as_eager": share}
        if device.type == "cuda" and record["provider"] == "trident":
            record["host_syncs_per_step"] = _syncs_per_step(runs["trident"], job)
    return records


def measure(  # noqa: PLR0913 - what a step is held against
    runs: Mapping[str, Run],
    job: Decode,
    itemsize: int,
    bandwidth: float,
    device: torch.device,
    num_samples: int,
) -> list[dict[str, Any]]:
    """Return a record a provider, all of which have run before and take turns."""
    clock = wall_clock(device)
    steps_ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_samples):
        for name, run in runs.items():
            short_ms, long_ms = (
                clock(lambda run=run, count=count: run(count))
                for count in (NUM_SHORT, job.num_long)
            )
            steps_ms[name].append((long_ms - short_ms) / job.num_steps)
    bound = job.bound_ms(itemsize, bandwidth)
    records = []
    for name, samples in steps_ms.items():
        timing = summary(samples)
        records.append(
            {
                "benchmark": "generation",
                "workload": "decode",
                "provider": name,
                "step_ms": timing.median_ms,
                "step_p20_ms": timing.p20_ms,
                "step_p80_ms": timing.p80_ms,
                "num_samples": timing.num_samples,
                "tokens_per_s": job.batch / timing.median_ms * 1e3,
                "bound_ms": bound,
                "bandwidth_share": bound / timing.median_ms,
                "read_bytes_per_s": bandwidth,
                "context": job.context,
                "num_steps": job.num_steps,
            }
        )
    return records


def _syncs_per_step(run: Run, job: Decode) -> float:
    """How often the host waits for the device, a decoding step of the whole batch."""
    short, long = (num_host_syncs(lambda n=n: run(n)) for n in (NUM_SHORT, job.num_long))
    return (long - short) / job.num_steps


def _check_steps(network: Network, job: Decode, config: SamplingConfig) -> None:
    """Raise RuntimeError where the two runs differ in anything but steps of the whole batch."""
    short, long = (answers(network, job, config, n)[1] for n in (NUM_SHORT, job.num_long))
    if long.num_steps - short.num_steps != job.num_steps or long.num_preempted:
        raise RuntimeError(
            f"{long.num_steps - short.num_steps} steps and {long.num_preempted} preemptions, not "
            f"{job.num_steps} steps: is there room for all contexts in the cache?"
        )


def table(job: Decode, records: list[dict[str, Any]]) -> Table:
    """Return one row a provider."""
    title = f"decode: {job.batch} sequences at contexts of {job.context} tokens"
    columns = ("provider", "ms a step", "tokens/s", "of bound", "captures, seconds: first call")
    shown = Table(*columns, "next call", "host waits a step", "greedy as eager", title=title)
    for record in records:
        captures = [
            f"{record[f'{when}_call_captures']}, {record[f'{when}_call_capture_s']:.2f}"
            if f"{when}_call_captures" in record
            else ""
            for when in ("first", "next")
        ]
        waits, same = record.get("host_syncs_per_step"), record.get("greedy_same_as_eager")
        shown.add_row(
            record["provider"],
            f"{record['step_ms']:.3f} ({record['step_p20_ms']:.3f} to {record['step_p80_ms']:.3f})",
            f"{record['tokens_per_s']:.0f}",
            f"{record['bandwidth_share']:.1%}",
            *captures,
            "" if waits is None else f"{waits:.3f}",
            "" if same is None else f"{same:.1%}",
        )
    return shown
