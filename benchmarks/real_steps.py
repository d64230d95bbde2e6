"""Times steps of SFT and of the reward model on records of real lengths, beside transformers.

Every provider has a process of its own (turns.py) and all take turns, step by step, on the same
batches: ours without padding (trident_steps.py), an eager loop (padded_steps.py) and transformers'
Trainer (trainer_steps.py), both padded to the longest of a micro-batch. Each cuts a batch into the
number of micro-batches that is fastest for it. Assembling a batch is part of a step.

Memory is what stays between steps and the most that a step holds besides, of torch's allocator: the
interpreter and its libraries, which no model makes larger, are not in it.
"""

import dataclasses
import math
import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.language_step import MOST_PARAMETERS_IN_TURNS
from benchmarks.provider_process import ProviderProcess, Say
from benchmarks.real_job import RealJob, num_sequences, num_tokens
from benchmarks.rivals import missing_rivals, rivals_environment
from models.sizes import size_as_json

GOALS = {"sft": 1.5, "rm": 1.2}
"""Of our examples a second over each of the others', fp32 on two cores."""
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}
"""By how much losses of one batch may differ; those of language_step.py."""
NEEDS = {
    "trident": (),
    "huggingface, eager": ("transformers",),
    "huggingface, Trainer": ("transformers", "accelerate"),
}


def _worker(provider: str, folder: Path, say: Say) -> ProviderProcess:
    """Return a provider's process (turns.py)."""
    command = [sys.executable, "-m", "benchmarks.turns", str(folder), provider]
    is_rival = "accelerate" in NEEDS[provider]
    environment = rivals_environment() if is_rival else os.environ
    return ProviderProcess(provider, command, environment, say)


def _ask(worker: ProviderProcess, what: str) -> dict[str, Any]:
    """Give a provider its turn and return what it says afterwards; raises ProviderError."""
    worker.tell("")
    return worker.hear(what)


def missing(provider: str) -> str | None:
    """Return a sentence that says what a provider lacks; None where it can run."""
    return missing_rivals(*NEEDS[provider])


def measure(
    job: RealJob,
    device: torch.device,
    providers: Sequence[str],
    note: Callable[[str], object] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yield a record a provider; note what is found on the way.

    RuntimeError, before anything is yielded, where a first loss is another than transformers' GPT-2
    has or later ones differ from each other. So it is where a provider read other tokens than the
    job has.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), None
        if set(providers) - {"trident"}:
            from benchmarks.padded_steps import write_weights

            wanted = write_weights(job, device, folder)
        (folder / "job.pickle").write_bytes(pickle.dumps((job, device)))
        takes_turns = job.size.num_parameters < MOST_PARAMETERS_IN_TURNS
        groups = [list(providers)] if takes_turns else [[each] for each in providers]
        told: dict[str, list[dict[str, Any]]] = {}
        chosen: dict[str, dict[str, Any]] = {}
        for group in groups:
            workers = [_worker(provider, folder, note) for provider in group]
            try:
                for worker in workers:
                    chosen[worker.name] = _ask(worker, "trying numbers of passes")
                    passes = chosen[worker.name]["passes"]
                    note(f"{worker.name}: of {job.passes} passes a step, {passes} is fastest")
                told |= _steps(job, workers, wanted)
            finally:
                for worker in workers:
                    worker.close()
    _check_last(job, told)
    records = {
        provider: _record(job, provider, steps)
        | {"took_turns": takes_turns and len(providers) > 1}
        | chosen[provider]
        for provider, steps in told.items()
    }
    for provider, record in records.items():
        if provider != "trident" and "trident" in records:
            ours = records["trident"]["examples_per_s"]
            record["trident_ratio"] = ours / record["examples_per_s"]
        yield record


def _steps(
    job: RealJob, workers: Sequence[ProviderProcess], wanted: float | None
) -> dict[str, list[dict[str, Any]]]:
    """Return what every provider said of every step, taken in turns."""
    told: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for step in range(job.num_steps):
        for worker in workers:
            said = _ask(worker, f"step {step}")
            told[worker.name].append(said)
            if said["num_tokens"] != (has := num_tokens(job.units(step))):
                raise RuntimeError(
                    f"{worker.name} read {said['num_tokens']} tokens in step {step}, the batch "
                    f"has {has}: nothing is compared"
                )
            if not math.isfinite(said["loss"]):
                raise RuntimeError(f"{worker.name}'s loss of step {step} is {said['loss']}")
            if step == 0 and wanted is not None:
                _check_loss(job, worker.name, said["loss"], wanted)
    return told


def _check_loss(job: RealJob, provider: str, found: float, wanted: float) -> None:
    if abs(found - wanted) > TOLERANCES[job.numerics.dtype]:
        raise RuntimeError(
            f"first losses differ, {found} of {provider} and {wanted} of transformers' GPT-2: "
            "nothing is compared"
        )


def _check_last(job: RealJob, told: dict[str, list[dict[str, Any]]]) -> None:
    """Raise RuntimeError where the losses after all the optimizer steps are not the same."""
    last = {provider: steps[-1]["loss"] for provider, steps in told.items()}
    if max(last.values()) - min(last.values()) > TOLERANCES[job.numerics.dtype]:
        raise RuntimeError(f"losses after {job.num_steps - 1} steps differ: {last}")


def _record(job: RealJob, provider: str, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a provider's record: of every batch the median of its rounds, averaged over the
    batches."""
    timed = steps[1 : 1 + job.num_timed]
    metered = steps[1 + job.num_timed :]
    of_batch = [timed[number :: len(job.batches)] for number in range(len(job.batches))]
    medians = [statistics.median(each["seconds"] for each in rounds) for rounds in of_batch]
    seconds = sum(medians)
    tokens = sum(num_tokens(units) for units in job.batches)
    positions = sum(rounds[0]["num_positions"] for rounds in of_batch)
    num_units = sum(len(units) for units in job.batches)
    return {
        "benchmark": f"{job.task}_step",
        "provider": provider,
        "median_s": seconds / len(job.batches),
        "batch_s": medians,
        "least_s": _mean_least("seconds", of_batch),
        # On a busy machine the others' work is not in it.
        "least_cpu_s": _mean_least("cpu_seconds", of_batch),
        "examples_per_s": num_units / seconds,
        "tokens_per_s": tokens / seconds,
        "padding": 1 - tokens / positions,
        "state_bytes": max(each["state_bytes"] for each in metered),
        "peak_bytes": max(each["peak_bytes"] for each in metered),
        "num_passes": statistics.mean(rounds[0]["num_passes"] for rounds in of_batch),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "goal": GOALS[job.task],
        "batch_size": len(job.batches[0]),
        "num_batches": len(job.batches),
        "num_sequences": sum(num_sequences(units) for units in job.batches) / len(job.batches),
        "num_tokens": tokens / len(job.batches),
        "num_rounds": job.num_rounds,
        "size": size_as_json(job.size),
        "numerics": dataclasses.asdict(job.numerics),
    }


def _mean_least(name: str, of_batch: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Return the least of every batch's rounds, averaged over the batches."""
    return statistics.mean(min(each[name] for each in rounds) for rounds in of_batch)
