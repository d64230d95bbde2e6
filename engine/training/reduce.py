"""A step's metrics as one: over micro-batches, data-parallel ranks and the stages of a pipeline.

A name's ending says how its values merge: `*_max` and `*_min` to the extreme, `*_moments` to those
of all, all others to their sum.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.parallel import Parallel
from kernels.moments import merge_moments

StepMetrics = dict[str, Tensor]
"""What a loss says of its micro-batch besides its value: name to tensor."""


def reduce_metrics(metrics: StepMetrics, parallel: Parallel) -> dict[str, float]:
    """Return the metrics of the last stages of all data-parallel ranks as numbers, the same on
    every rank.

    Ranks that share rows have the same metrics, so those of a pipeline's last stage ask one another
    along dp only, and tell their pipeline: a thousand ranks send a handful of messages each.
    `*_moments` [3] give two numbers, `*_mean` and `*_variance`.
    """
    values: dict[str, float] = {}
    if parallel.is_last_stage:
        sizes = [value.numel() for value in metrics.values()]  # in the same order on every rank
        mine = torch.cat([value.double().flatten() for value in metrics.values()])
        gathered = mine.new_empty(parallel.dp * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=parallel.dp_group)
        rows = gathered.cpu().view(parallel.dp, -1)  # sync: the only one
        parts = [dict(zip(metrics, row.split(sizes), strict=True)) for row in rows]
        values = _numbers(merge_metrics(parts))  # in rank order: the same sum everywhere
    if parallel.layout.pp > 1:
        told = [values]
        dist.broadcast_object_list(told, src=parallel.last_stage_rank, group=parallel.pp_group)
        values = told[0]
    return values


def _numbers(merged: StepMetrics) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, value in merged.items():
        if name.endswith("_moments"):
            count, mean, squares = value.tolist()
            stem = name.removesuffix("_moments")
            values[f"{stem}_mean"] = mean
            values[f"{stem}_variance"] = squares / max(count, 1.0)
        else:
            values[name] = float(value)
    return values


def merge_metrics(stored: Sequence[StepMetrics]) -> StepMetrics:
    """Return the metrics of several micro-batches or ranks as one, in the order given."""
    merged: StepMetrics = {}
    for metrics in stored:
        for name, value in metrics.items():
            value = value.detach()
            merged[name] = _combine(name, merged[name], value) if name in merged else value
    return merged


def _combine(name: str, a: Tensor, b: Tensor) -> Tensor:
    if name.endswith("_max"):
        return torch.maximum(a, b)
    if name.endswith("_min"):
        return torch.minimum(a, b)
    if name.endswith("_moments"):
        return merge_moments(torch.stack([a, b]))
    return a + b
