"""Compares generation with Hugging Face's `generate`, and vLLM's where it is installed.

    python -m benchmarks.generation --device cpu
    python -m benchmarks.generation --device cuda --size 1.3b --out benchmarks/results
    python -m benchmarks.generation --device cuda --workload decode --providers trident

All providers have the same random GPT-2 and answer the same prompts with the same number of tokens,
drawn at temperature 1; they take turns in one process, on the same number of threads. On "fixed"
every answer has 64 tokens; on "mixed" 16 to 256, of which nobody is told in advance: Hugging Face
decodes a batch until its longest answer is done. Only tokens up to an answer's own length count.
"decode" is the step alone, at contexts of a given length, with CUDA graphs and without
(decoding.py).
"""

import argparse
import dataclasses
import functools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GPT2LMHeadModel

from benchmarks import decoding
from benchmarks.command_line import check_context, command, count, mistakes_in_one_line
from benchmarks.decoding import NO_EOS, NUM_SHORT, Decode, agreement, measure, measure_trident
from benchmarks.random_gpt2 import random_gpt2
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path, time_calls, wall_clock
from engine.errors import UserError
from engine.generation.generate import generate
from engine.generation.scheduler import Counts
from engine.huggingface.convert import load_huggingface
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network, build_network
from models.sizes import SIZES, GPTSize, size_as_json

PROMPT_LENGTH = 64
WORKLOADS = ("decode", "fixed", "mixed")
PROVIDERS = ("trident", "huggingface", "vllm")
BENCHMARK_SIZES = {
    "cpu": GPTSize(num_layers=4, hidden_size=256, num_heads=4, vocab_size=8192, context_length=512),
    "125m": SIZES["125m"],
    "1.3b": SIZES["1.3b"],
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of PROMPT_LENGTH tokens, and how many tokens each answer has."""

    name: str
    prompts: np.ndarray  # [n, PROMPT_LENGTH]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.lengths)


def workloads(size: GPTSize, batch: int) -> list[Workload]:
    """Return one batch of 64 tokens each, and three batches of 16 to 256."""
    rng = np.random.default_rng(0)

    def prompts(count: int) -> np.ndarray:
        return rng.integers(0, size.vocab_size, (count, PROMPT_LENGTH))

    mixed = rng.integers(16, 257, 3 * batch).tolist()
    return [
        Workload(name="fixed", prompts=prompts(batch), lengths=[64] * batch),
        Workload(name="mixed", prompts=prompts(3 * batch), lengths=mixed),
    ]


def run_trident(
    network: Network, workload: Workload, config: SamplingConfig, counts: Counts | None = None
) -> dict[int, np.ndarray]:
    """Return every answer's tokens."""
    responses = generate(
        network,
        list(workload.prompts),
        config,
        eos_id=NO_EOS,
        seed=0,
        max_new_tokens=workload.lengths,
        counts=counts,
    )
    return {response.sample_index: response.tokens for response in responses}


@torch.inference_mode()
def run_huggingface(
    model: GPT2LMHeadModel, workload: Workload, batch: int, *, is_greedy: bool = False
) -> torch.Tensor:
    """Decode batch after batch, each to its longest answer; return the last batch's tokens."""
    for start in range(0, len(workload.prompts), batch):
        rows = torch.from_numpy(workload.prompts[start : start + batch]).to(model.device)
        tokens = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=not is_greedy,
            top_k=0,
            max_new_tokens=max(workload.lengths[start : start + batch]),
        )
    return tokens[:, rows.shape[1] :]


def vllm_provider(folder: Path, size: GPTSize, dtype: torch.dtype) -> Callable[[Workload], Any]:
    """Return vLLM's way to run a workload; ImportError where it is not installed."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=size.context_length,
        gpu_memory_utilization=0.4,
        enable_prefix_caching=False,
    )

    def run(workload: Workload) -> None:
        prompts = [TokensPrompt(prompt_token_ids=row) for row in workload.prompts.tolist()]
        settings = [
            SamplingParams(max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False)
            for length in workload.lengths
        ]
        model.generate(prompts, settings, use_tqdm=False)

    return run


def bound_seconds(workload: Workload, network: Network, batch: int, bandwidth: float) -> float:
    """Return the time to read the weights once a step of a full batch, and each token's context.

    bandwidth: bytes a second, read.
    """
    size, itemsize = network.size, network.dtype.itemsize
    weights = size.num_parameters * itemsize * math.ceil(workload.num_tokens / batch)
    contexts = sum(n * PROMPT_LENGTH + n * (n - 1) // 2 for n in workload.lengths)
    cache = contexts * 2 * size.num_layers * size.hidden_size * itemsize
    return (weights + cache) / bandwidth


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a sum over a large tensor reads."""
    numbers = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    numbers.sum()
    timing = time_calls({"sum": lambda: numbers.sum()}, wall_clock(device), num_samples=10)
    return numbers.nbytes / (timing["sum"].median_ms / 1e3)


def check_greedy(network: Network, model: GPT2LMHeadModel, workload: Workload) -> None:
    """Raise RuntimeError where fp32 answers differ from Hugging Face's: both must be right."""
    prompts = workload.prompts[:8]
    few = dataclasses.replace(workload, prompts=prompts, lengths=[24] * len(prompts))
    ours = run_trident(network, few, SamplingConfig(temperature=0.0))
    theirs = run_huggingface(model, few, 8, is_greedy=True).cpu().numpy()
    if network.dtype is torch.float32 and any(
        (ours[i] != row).any() for i, row in enumerate(theirs)
    ):
        raise RuntimeError("greedy answers differ from Hugging Face's: nothing is compared")


@mistakes_in_one_line()
def main() -> None:
    """Time the providers on each workload; print tables and, with --out, append records."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(arguments.device)
    size = BENCHMARK_SIZES[arguments.size or ("cpu" if device.type == "cpu" else "1.3b")]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    batch = arguments.batch
    decode = Decode(size=size, batch=batch, context=_context(arguments, size))
    where = machine(device, dtype)
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    parallel = start_parallel(ParallelLayout(), seed=0)
    numerics = Numerics(dtype="fp32" if device.type == "cpu" else "bf16")
    network = build_network("language", size, parallel, numerics=numerics)
    config = SamplingConfig(num_slots=batch)
    bandwidth = read_bandwidth(device)
    console.print(f"{size}, batch {batch}, reads {bandwidth / 1e9:.1f} GB/s")
    shape = {"size": size_as_json(size), "batch": batch} | where

    def publish(records: list[dict[str, Any]]) -> None:
        if arguments.out:
            for record in records:
                append_record(records_path(arguments.out, device), record | shape)

    runs: dict[str, Callable[[Workload], Any]] = {}
    if "trident" in arguments.providers:
        runs["trident"] = lambda workload: run_trident(network, workload, config)
    if "decode" in arguments.workload and runs:
        records = measure_trident(network, decode, bandwidth, arguments.num_samples)
        share = _fp32_agreement(parallel)
        publish([record | {"fp32_greedy_same_as_eager": share} for record in records])
        print_whole(console, decoding.table(decode, records))
        if share < 1.0:
            raise RuntimeError(f"graphs change fp32 greedy answers: {share:.1%} are the same")
    with tempfile.TemporaryDirectory() as folder:
        rivals, model = _rivals(arguments, network, dtype, Path(folder), console)
    runs |= rivals
    if model is not None and "trident" in runs:
        check_greedy(network, model, workloads(size, batch)[0])
    if "decode" in arguments.workload and model is not None:
        records = decode_huggingface(model, decode, bandwidth, arguments.num_samples)
        publish(records)
        print_whole(console, decoding.table(decode, records))
    for workload in workloads(size, batch):
        if workload.name in arguments.workload:
            records = run_workload(workload, runs, network, batch, arguments.num_samples)
            bound = bound_seconds(workload, network, batch, bandwidth)
            publish(
                [record | {"bandwidth_share": bound / record["median_s"]} for record in records]
            )
            print_whole(console, _table(workload, records, bound))


def _fp32_agreement(parallel: Parallel) -> float:
    """Return how much of a small model's greedy answers graphs leave as they are, in fp32."""
    size = BENCHMARK_SIZES["cpu"]
    network = build_network("language", size, parallel, numerics=Numerics(dtype="fp32"))
    return agreement(network, Decode(size=size, batch=8, context=64, num_steps=16))


def _context(arguments: argparse.Namespace, size: GPTSize) -> int:
    context = arguments.context or min(1024, size.context_length // 2)
    decode = Decode(size=size, batch=arguments.batch, context=context)
    if decode.prompt_tokens < 1:
        raise UserError(f"--context {context} leaves no prompt before the tokens that are timed")
    longest = decode.prompt_tokens + decode.num_long
    check_context(f"--context {context} in the middle", longest, size.context_length)
    return context


def _rivals(
    arguments: argparse.Namespace,
    network: Network,
    dtype: torch.dtype,
    folder: Path,
    console: Console,
) -> tuple[dict[str, Callable[[Workload], Any]], GPT2LMHeadModel | None]:
    """Return how the rivals run, and the model of Hugging Face; ours gets the same weights."""
    runs: dict[str, Callable[[Workload], Any]] = {}
    if not {"huggingface", "vllm"} & set(arguments.providers):
        return runs, None
    size, batch = network.size, arguments.batch
    model = random_gpt2(size, network.parallel.device, dtype)
    model.save_pretrained(folder)
    load_huggingface(network, folder)
    if "huggingface" in arguments.providers:
        runs["huggingface"] = lambda workload: run_huggingface(model, workload, batch)
    if "vllm" in arguments.providers:
        try:
            runs["vllm"] = vllm_provider(folder, size, dtype)
        except ImportError:
            console.print("vLLM is not installed: left out")
    return runs, model if "huggingface" in arguments.providers else None


def run_workload(
    workload: Workload,
    runs: dict[str, Callable[[Workload], Any]],
    network: Network,
    batch: int,
    num_samples: int,
) -> list[dict[str, Any]]:
    """Return a record a provider."""
    device = network.parallel.device
    if device.type == "cuda":  # whatever is compiled or captured on the first run
        for run in runs.values():
            run(workload)
    records = _measure(workload, runs, wall_clock(device), num_samples)
    for record in records:
        if record["provider"] == "trident":
            counts = Counts()
            run_trident(network, workload, SamplingConfig(num_slots=batch), counts)
            record["slot_use"] = counts.num_sampled / counts.num_slot_steps
        if record["provider"] == "huggingface":
            record["slot_use"] = workload.num_tokens / _huggingface_slot_steps(workload, batch)
    return records


def decode_huggingface(
    model: GPT2LMHeadModel, job: Decode, bandwidth: float, num_samples: int
) -> list[dict[str, Any]]:
    """Return the record of Hugging Face's decoding step."""
    prompts = np.stack(job.prompts())

    def run(num_tokens: int) -> None:
        lengths = [num_tokens] * job.batch
        workload = Workload(name="decode", prompts=prompts, lengths=lengths)
        run_huggingface(model, workload, job.batch)

    run(NUM_SHORT)
    return measure(
        {"huggingface": run}, job, model.dtype.itemsize, bandwidth, model.device, num_samples
    )


def _measure(
    workload: Workload, runs: dict[str, Callable], clock: Callable, num_samples: int
) -> list[dict[str, Any]]:
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    wall_seconds: dict[str, list[float]] = {name: [] for name in runs}

    def call(name: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        runs[name](workload)
        cpu_seconds[name].append(time.process_time() - cpu)
        wall_seconds[name].append(time.perf_counter() - wall)

    calls = {name: functools.partial(call, name) for name in runs}
    records = []
    for name, timing in time_calls(calls, clock, num_samples=num_samples).items():
        records.append(
            {
                "benchmark": "generation",
                "workload": workload.name,
                "provider": name,
                "median_s": timing.median_ms / 1e3,
                "p20_s": timing.p20_ms / 1e3,
                "p80_s": timing.p80_ms / 1e3,
                "min_s": min(wall_seconds[name]),
                "cpu_median_s": statistics.median(cpu_seconds[name]),
                "cpu_min_s": min(cpu_seconds[name]),
                "num_samples": timing.num_samples,
                "tokens_per_s": workload.num_tokens / timing.median_ms * 1e3,
            }
        )
    return records


def _huggingface_slot_steps(workload: Workload, batch: int) -> int:
    lengths = [
        workload.lengths[start : start + batch] for start in range(0, len(workload.lengths), batch)
    ]
    return sum(len(part) * max(part) for part in lengths)


def _table(workload: Workload, records: list[dict[str, Any]], bound: float) -> Table:
    title = f"{workload.name}: {len(workload.lengths)} prompts, {workload.num_tokens} tokens"
    columns = ("provider", "seconds", "useful tokens/s", "x Hugging Face: median", "least")
    table = Table(*columns, "CPU time", "slots used", "of bound", title=title)
    theirs = next((r for r in records if r["provider"] == "huggingface"), None)
    for record in records:
        ratios = [
            f"{theirs[key] / record[key]:.2f}" if theirs else ""
            for key in ("median_s", "min_s", "cpu_min_s")
        ]
        table.add_row(
            record["provider"],
            f"{record['median_s']:.2f} ({record['p20_s']:.2f} to {record['p80_s']:.2f})",
            f"{record['tokens_per_s']:.0f}",
            *ratios,
            f"{record['slot_use']:.0%}" if "slot_use" in record else "",
            f"{bound / record['median_s']:.0%}",
        )
    return table


def _parse() -> argparse.Namespace:
    parser = command("generation")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=BENCHMARK_SIZES, help="default: cpu, on a GPU 1.3b")
    parser.add_argument("--batch", type=count, default=64, help="sequences decoded together")
    parser.add_argument("--num-samples", type=count, default=3, help="runs of each provider")
    parser.add_argument(
        "--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="default: all"
    )
    parser.add_argument(
        "--context", type=count, help="of decode; default: 1024 or half the model's"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
