"""Steps of SFT and of a reward model as a reader of transformers' tutorials writes them.

transformers' GPT-2 through torch's SDPA and its one-kernel GELU; every micro-batch is padded on the
right to its longest sequence, with an attention mask; fused AdamW; 16 bits by autocast over fp32
weights.
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.real_job import ADAM, PAD, RealJob, num_targets
from benchmarks.turns import Turns
from engine.data.examples import Unit, sequences_of
from engine.ranks.device import DTYPES

HEAD = "head.npy"
"""Beside the weights: the reward model's head [1, hidden], fp32, without a bias."""
IGNORED = -100  # a label that asks for no loss, as torch's cross_entropy has it
Batch = dict[str, torch.Tensor]


def run(turns: Turns, folder: Path, passes: int) -> None:
    """Take the steps, each batch cut into `passes` micro-batches of as many units."""
    job, device = turns.job, turns.device
    model = load_model(job, folder, device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=ADAM.lr,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.epsilon,
        weight_decay=ADAM.weight_decay,
        fused=True,
    )

    def state() -> list[torch.Tensor]:
        moments = [value for values in optimizer.state.values() for value in values.values()]
        return [*model.parameters(), *moments]

    turns.state = state
    for step in turns.steps():
        units = job.units(step)
        total = torch.zeros((), device=device)
        positions = tokens = num_passes = 0
        for part in cut(units, passes):
            batch = {name: value.to(device) for name, value in collate(part).items()}
            with autocast(job, device):
                loss = share_of_loss(job, model, batch, units)
            loss.backward()
            total += loss.detach()
            positions += batch["input_ids"].numel()
            tokens += int(batch["attention_mask"].sum())
            num_passes += 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.report(
            loss=float(total), num_tokens=tokens, num_positions=positions, num_passes=num_passes
        )


def settings() -> dict[str, Any]:
    """Return what the provider is told, for the record."""
    return {
        "transformers": importlib.import_module("transformers").__version__,
        "attention": "sdpa",
        "optimizer": "torch.optim.AdamW, fused",
    }


def write_weights(job: RealJob, device: torch.device, folder: Path) -> float:
    """Write the weights that all start from; return transformers' loss of the first batch with
    them, by forward passes alone, one sequence each and nothing padded."""
    from transformers.utils import logging

    from benchmarks.random_gpt2 import random_gpt2

    logging.disable_progress_bar()
    random_gpt2(job.size, device, DTYPES[job.numerics.dtype]).save_pretrained(folder)
    hidden = job.size.hidden_size
    head = np.random.default_rng(2).normal(size=(1, hidden)) / (hidden + 1) ** 0.5
    np.save(folder / HEAD, head.astype(np.float32))
    model = load_model(job, folder, device).eval()
    units = job.units(0)
    total = 0.0
    for unit in units:
        rows = [torch.from_numpy(each.tokens).to(device)[None] for each in sequences_of(unit)]
        with torch.no_grad(), autocast(job, device):
            logits = [model(row, use_cache=False).logits.float() for row in rows]
        if job.task == "sft":
            (example,) = sequences_of(unit)
            first = example.prompt_length
            losses = F.cross_entropy(logits[0][0, first - 1 : -1], rows[0][0, first:])
            total += float(losses) * (len(example.tokens) - first) / num_targets(units)
        else:
            scores = torch.cat(logits)[:, 0]
            ranks = torch.tensor([int(each.fields["ranks"]) for each in sequences_of(unit)])
            total += float(pairwise_loss(scores, ranks.to(device))) / len(units)
    return total


def load_model(job: RealJob, folder: Path, device: torch.device) -> Any:
    """Return transformers' model of the task with the folder's weights, in fp32, no dropout."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    options: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "dtype": torch.float32,
        "pad_token_id": PAD,
        **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
    }
    if job.task == "sft":
        return transformers.GPT2LMHeadModel.from_pretrained(folder, **options).to(device)
    kind = transformers.GPT2ForSequenceClassification
    model = kind.from_pretrained(folder, num_labels=1, **options)
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(np.load(folder / HEAD)))
    return model.to(device)


def cut(units: Sequence[Unit], passes: int) -> Iterator[Sequence[Unit]]:
    """Yield the units in their order, cut into micro-batches of as many each, `passes` at most."""
    size = -(-len(units) // passes)
    for first in range(0, len(units), size):
        yield units[first : first + size]


def collate(units: Sequence[Unit]) -> Batch:
    """Return input_ids, attention_mask and labels [B, L] of the units' sequences, padded on the
    right to the longest; labels only of what is predicted. Of rankings also ranks [B] and sizes,
    the completions of each prompt [P]."""
    sequences = [sequence for unit in units for sequence in sequences_of(unit)]
    rows = [torch.from_numpy(sequence.tokens) for sequence in sequences]
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if "ranks" in sequences[0].fields:
        ranks = [int(sequence.fields["ranks"]) for sequence in sequences]
        sizes = [len(sequences_of(unit)) for unit in units]
        return batch | {"ranks": torch.tensor(ranks), "sizes": torch.tensor(sizes)}
    labels = [row.clone() for row in rows]
    for row, sequence in zip(labels, sequences, strict=True):
        row[: sequence.prompt_length] = IGNORED
    return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)}


def share_of_loss(job: RealJob, model: Any, batch: Batch, units: Sequence[Unit]) -> torch.Tensor:
    """Return a micro-batch's share of the loss of the global batch `units`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    if job.task == "sft":
        targets = batch["labels"][:, 1:].flatten()
        rows = logits[:, :-1].flatten(0, 1).float()
        total = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
        return total / num_targets(units)
    return ranking_losses(logits, batch).sum() / len(units)


def ranking_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss [P] of every prompt of a micro-batch from the scores [B, 1]."""
    sizes = batch["sizes"].tolist()
    scores, ranks = logits[:, 0].float().split(sizes), batch["ranks"].split(sizes)
    return torch.stack([pairwise_loss(*pair) for pair in zip(scores, ranks, strict=True)])


def pairwise_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log sigmoid(better - worse) over all pairs of K completions without
    ties."""
    ordered = scores[ranks.argsort()]
    better, worse = torch.triu_indices(len(ordered), len(ordered), 1, device=scores.device)
    return -F.logsigmoid(ordered[better] - ordered[worse]).mean()


def autocast(job: RealJob, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which a job's dtype is computed."""
    if job.numerics.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[job.numerics.dtype])
