"""Times a step of language-model training beside plain torch: transformers' GPT-2, and AdamW.

Both start from the same random weights and read the same tokens, whole sequences of one length, in
micro-batches of the same tokens. Their first losses must agree before anything is timed. 16-bit
weights: ours with fp32 masters and fp32 gradient sums; torch's fp32 weights under autocast, which
is how plain torch trains in bf16.

Small models take turns; large ones are timed one after the other, ours first, each in the memory
that the other gave back. At 1.3B, bf16 and 8192 tokens a pass ours has 24 GB between steps and some
15 GB of activations. The other has 21 GB, and within a step some 28 GB of activations, weights in
bf16 and logits: 88 GB together.
"""

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from benchmarks.real_job import ADAM
from benchmarks.step_profile import profile_call
from benchmarks.timing import (
    device_name,
    free_memory,
    matmul_flops,
    peak_bytes,
    tensor_bytes,
    time_calls,
    wall_clock,
)
from engine.data.examples import Example
from engine.feed import pack_for
from engine.huggingface.convert import load_huggingface
from engine.losses import NegativeLogLikelihood
from engine.planning.hardware import GPUS
from engine.ranks.device import DTYPES
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from engine.training.passes import forward_backward
from models.sizes import GPTSize, size_as_json

PROVIDERS = ("trident", "huggingface")
MOST_PARAMETERS_IN_TURNS = 500_000_000
"""Of models that take turns, in memory together; our choice: at 350M both need 30 GB."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step: so many sequences of one length, all their tokens but the first predicted."""

    size: GPTSize
    numerics: Numerics
    num_sequences: int
    length: int
    micro_batch_tokens: int

    @property
    def tokens(self) -> np.ndarray:
        """[num_sequences, length] token ids, the same at every call."""
        shape = (self.num_sequences, self.length)
        return np.random.default_rng(0).integers(0, self.size.vocab_size, shape)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return self.num_sequences * self.length

    @property
    def num_targets(self) -> int:
        """Predicted tokens of the step."""
        return self.num_sequences * (self.length - 1)

    @property
    def model_flops(self) -> float:
        """FLOPs of forward and backward pass, a multiplication and an addition each: the matrices,
        attention over the keys a causal token sees, and the head; no recomputation, no padding."""
        size = self.size
        matrices = 24.0 * size.hidden_size**2
        attention = 4.0 * size.hidden_size * (self.length + 1) / 2
        head = 2.0 * size.hidden_size * size.vocab_size
        forward = size.num_layers * (matrices + attention) * self.num_tokens
        return 3 * (forward + head * self.num_targets)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A provider's network and optimizer."""

    step: Callable[[], float]
    """One optimizer step; returns its loss."""
    state: Callable[[], dict[str, list[torch.Tensor]]]
    """What stays in memory between steps, by what it is for."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How often a step is timed, and what it is held against."""

    num_samples: int
    peak_flops: float
    """FLOP/s that count as all."""
    peak_flops_source: str = ""
    """Where those are from."""
    with_profile: bool = False
    """Whether a step more is run under the profiler."""


def trident(job: Job, device: torch.device, weights: Path | None) -> Trainer:
    """Return this engine's training on one rank, from a Hugging Face folder or random weights."""
    parallel = start_parallel(ParallelLayout(), seed=0)
    network = build_network("language", job.size, parallel, numerics=job.numerics)
    if weights is not None:
        load_huggingface(network, weights)
    optimizer = Optimizer(network, ADAM, total_steps=1)
    optimizer.prepare_state()
    examples = [Example(tokens=row, prompt_length=1) for row in job.tokens]
    batches = pack_for(examples, parallel, job.micro_batch_tokens)
    loss = NegativeLogLikelihood(job.num_targets)

    def step() -> float:
        optimizer.zero_gradients()
        found = forward_backward(network, batches, loss)
        optimizer.step(0)
        return float(found["loss"])

    def state() -> dict[str, list[torch.Tensor]]:
        buffers = [buffer for chunk in network.chunks for buffer in chunk.buffers]
        return {
            "weights": [buffer.param_data for buffer in buffers],
            "gradients": [buffer.grad_data for buffer in buffers],
            "optimizer": optimizer.state_tensors(),
        }

    return Trainer(step=step, state=state)


def plain_torch(job: Job, device: torch.device, model: Any) -> Trainer:
    """Return the training loop that a reader of torch's tutorials would write."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=ADAM.lr,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.epsilon,
        weight_decay=ADAM.weight_decay,
        fused=device.type == "cuda",
    )
    rows = torch.from_numpy(job.tokens).to(device)
    micro_batches = rows.split(max(1, job.micro_batch_tokens // job.length))
    dtype = DTYPES[job.numerics.dtype]

    def step() -> float:
        total = torch.zeros((), device=device)
        for part in micro_batches:
            with _autocast(device, dtype):
                logits = model(part, use_cache=False).logits
            targets = part[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            loss = loss / job.num_targets
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    def state() -> dict[str, list[torch.Tensor]]:
        moments = [value for values in optimizer.state.values() for value in values.values()]
        return {"weights": list(model.parameters()), "optimizer": moments}

    return Trainer(step=step, state=state)


def plain_loss(job: Job, device: torch.device, model: Any) -> float:
    """Return a model's loss on the job's tokens, by forward passes alone, a sequence each."""
    total = torch.zeros((), device=device)
    rows = torch.from_numpy(job.tokens).to(device)
    for row in rows.split(1):
        with torch.no_grad(), _autocast(device, DTYPES[job.numerics.dtype]):
            logits = model(row, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), row[0, 1:], reduction="sum")
    return float(total) / job.num_targets


def measure(
    job: Job, device: torch.device, providers: Sequence[str], effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yield a record a provider as soon as it is there, and one of its profile where asked for.

    ImportError where transformers is missing for "huggingface"; RuntimeError where a first loss is
    another than transformers' GPT-2 has.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, loss = None, None
        if "huggingface" in providers:
            folder = Path(name)
            loss = _write_weights(job, device, folder)
        makers = {
            "trident": lambda: trident(job, device, folder),
            "huggingface": lambda: plain_torch(job, device, _rounded_gpt2(job, device)),
        }
        takes_turns = job.size.num_parameters < MOST_PARAMETERS_IN_TURNS
        for group in [list(providers)] if takes_turns else [[name] for name in providers]:
            trainers = {name: makers[name]() for name in group}
            for name, trainer in trainers.items():
                _check_loss(name, trainer.step(), loss, job)
            yield from _time(job, device, trainers, effort)
            del trainers, trainer
            free_memory(device)


def _rounded_gpt2(job: Job, device: torch.device) -> Any:
    """Return transformers' GPT-2 in fp32 with the numbers that the job's dtype can hold."""
    from benchmarks.random_gpt2 import random_gpt2

    return random_gpt2(job.size, device, DTYPES[job.numerics.dtype]).float()


def _write_weights(job: Job, device: torch.device, folder: Path) -> float:
    """Write the weights that all start from; return the loss of transformers' GPT-2 with them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = _rounded_gpt2(job, device)
    loss = plain_loss(job, device, model)
    model.to(DTYPES[job.numerics.dtype]).save_pretrained(folder)
    del model
    free_memory(device)
    return loss


def _check_loss(name: str, found: float, wanted: float | None, job: Job) -> None:
    if wanted is None:
        return
    if abs(found - wanted) > (1e-3 if job.numerics.dtype == "fp32" else 3e-2):
        raise RuntimeError(
            f"first losses differ, {found} of {name} and {wanted} of transformers' GPT-2: nothing "
            "is compared"
        )


def _time(
    job: Job, device: torch.device, trainers: Mapping[str, Trainer], effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yield the records of trainers that have taken a step, which take turns."""
    for trainer in trainers.values():
        trainer.step()
    calls: Mapping[str, Callable[[], object]] = {name: t.step for name, t in trainers.items()}
    timings = time_calls(calls, wall_clock(device), num_samples=effort.num_samples)
    for name, timing in timings.items():
        seconds = timing.median_ms / 1e3
        state = tensor_bytes(itertools.chain(*trainers[name].state().values()))
        shape = {
            "provider": name,
            "num_sequences": job.num_sequences,
            "length": job.length,
            "micro_batch_tokens": job.micro_batch_tokens,
            "size": size_as_json(job.size),
            "numerics": dataclasses.asdict(job.numerics),
        }
        yield {
            "benchmark": "train_step",
            "median_s": seconds,
            "p20_s": timing.p20_ms / 1e3,
            "p80_s": timing.p80_ms / 1e3,
            "num_samples": timing.num_samples,
            "took_turns": len(trainers) > 1,
            "tokens_per_s": job.num_tokens / seconds,
            "model_flops_per_s": job.model_flops / seconds,
            "mfu": job.model_flops / seconds / effort.peak_flops,
            "peak_flops": effort.peak_flops,
            "peak_flops_source": effort.peak_flops_source,
            "state_bytes": state,
            "peak_bytes": state + peak_bytes(trainers[name].step, device),
        } | shape
        if effort.with_profile:
            found = profile_call(trainers[name].step, device)
            yield (
                {"benchmark": "train_step_profile"}
                | found.record()
                | shape
                | {"text": f"{name}: {found.table()}"}
            )


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s of the GPU's datasheet in 16 bits, else of a large matrix product measured
    here; and which of the two it is."""
    names = {name for name in GPUS if name in device_name(device).lower()}
    if device.type == "cuda" and dtype != torch.float32 and names:
        return GPUS[max(names, key=len)].flops, "datasheet"
    return matmul_flops(device, dtype), "matrix product"


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def table(job: Job, records: list[dict[str, Any]]) -> Table:
    """Return the providers' records as a table."""
    source = records[0]["peak_flops_source"]
    columns = ("provider", "seconds a step", "tokens/s", "TFLOP/s", f"of {source}", "peak GB")
    title = f"{job.num_sequences} x {job.length} tokens a step, {job.micro_batch_tokens} a pass"
    drawn = Table(*columns, title=title)
    for record in records:
        drawn.add_row(
            record["provider"],
            f"{record['median_s']:.3f} ({record['p20_s']:.3f} to {record['p80_s']:.3f})",
            f"{record['tokens_per_s']:.0f}",
            f"{record['model_flops_per_s'] / 1e12:.3f}",
            f"{record['mfu']:.1%}",
            f"{record['peak_bytes'] / 1e9:.3f}",
        )
    return drawn
