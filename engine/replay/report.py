"""What a replay says of weights, of a batch and of a pass; all ranks call together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from engine.data.examples import Unit, sequences_of
from engine.replay.watch import Finding
from engine.training.diagnosis import named_weights
from engine.training.network import Network


def of_weights(network: Network) -> str:
    """Return a clause on the weights of all ranks: the largest, and those that are not finite."""
    broken, largest, where = [], 0.0, ""
    for name, weight in named_weights(network):
        size = float(weight.detach().abs().max())
        if not math.isfinite(size):
            broken.append(name)
        elif size >= largest:
            largest, where = size, name
    told = _gathered((broken, largest, where))
    names = list(dict.fromkeys(name for names, *_ in told for name in names))
    _, largest, where = max(told, key=lambda each: each[1])
    state = f"not finite in {', '.join(names)}" if names else "finite"
    return f"{state}; the largest is {largest:.4g} in {where}"


def of_batch(sources: Mapping[str, Sequence[Unit]]) -> str:
    """Return a line on the batch: its size, and which of its fields are not finite."""
    parts = []
    for name, units in sources.items():
        sequences = [sequence for unit in units for sequence in sequences_of(unit)]
        broken = {
            field
            for sequence in sequences
            for field, value in sequence.fields.items()
            if not torch.as_tensor(value).isfinite().all()
        }
        num_tokens = sum(len(sequence.tokens) for sequence in sequences)
        state = f", not finite: {', '.join(sorted(broken))}" if broken else ""
        parts.append(f"{name} {len(sequences)} sequences of {num_tokens} tokens{state}")
    return f"batch: {'; '.join(parts)}"


def of_pass(name: str, finding: Finding | None) -> list[str]:
    """Return lines on a pass: what each rank found first in it."""
    told = _gathered(None if finding is None else str(finding))
    found = [f"rank {rank}: {each}" for rank, each in enumerate(told) if each is not None]
    return [f"{name}, first not finite on {each}" for each in found] or [f"{name}: finite"]


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
