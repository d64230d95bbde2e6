"""What of a step was not finite, found out once it is known that something was: its losses, or the
gradients of which parameters on which ranks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.training.network import Network
from engine.training.reduce import StepMetrics

_NUM_NAMED = 3  # parameters that are named; our choice: a line on screen holds them


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was not finite, the same on every rank."""

    losses: dict[str, str]
    """Of the losses that were not, their values by name."""
    gradients: dict[str, list[int]]
    """The ranks that held numbers that were not, by parameter, in the order of the network."""

    def __str__(self) -> str:
        """Return it as a clause."""
        parts = [f"{name} is {value}" for name, value in self.losses.items()]
        if self.gradients:
            named = list(self.gradients.items())[:_NUM_NAMED]
            texts = [f"{name} (rank {', '.join(map(str, ranks))})" for name, ranks in named]
            rest = len(self.gradients) - len(named)
            more = f" and {rest} more" if rest else ""
            parts.append(f"the gradient is not finite in {', '.join(texts)}{more}")
        return "; ".join(parts) or "the gradient's norm is not finite, each of its numbers is"


def losses_in(metrics: StepMetrics) -> StepMetrics:
    """Return those of a step's metrics without which its gradient means nothing: its losses, and
    the sum of a reward model's scores."""
    return {
        name: value
        for name, value in metrics.items()
        if name.endswith("loss") or name == "score_sum"
    }


def check_of(metrics: StepMetrics, like: Tensor) -> Tensor:
    """Return a tensor as `like`, of 0 where the losses are finite, of NaN where one is not: what it
    is added to is then not finite either, and nothing waits for it."""
    values = [value.detach().double().sum() for value in losses_in(metrics).values()]
    if not values:  # a rank without the last stage
        return torch.zeros_like(like)
    return (0.0 * torch.stack(values).to(like.device)).sum().to(like.dtype).expand_as(like)


def diagnose(network: Network, metrics: StepMetrics) -> Diagnosis:
    """Return what was not finite in a step's losses and in the gradients in the network's buffers;
    all ranks call together, and wait for the device.

    Data-parallel ranks keep what they added themselves, but for the range that each has reduced.
    """
    broken = {
        name: f"{float(value):g}"
        for name, value in losses_in(metrics).items()
        if not math.isfinite(float(value))
    }
    gradients = {name: p.main_grad for name, p in named_weights(network) if p.requires_grad}
    found = [broken, _not_finite(gradients)]
    gathered: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    losses: dict[str, str] = {}
    ranks: dict[str, list[int]] = {}
    for rank, (broken, names) in enumerate(gathered):
        losses |= broken
        for name in names:
            ranks.setdefault(name, []).append(rank)
    return Diagnosis(losses=losses, gradients=ranks)


def named_weights(network: Network) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of this rank by name, layers numbered over the whole network from 0."""
    for module in network.modules:
        for name, parameter in module.named_parameters():
            yield layer_named(module, name), parameter


def layer_named(module: torch.nn.Module, name: str) -> str:
    """Return the name of a part of a pipeline's chunk, with its layer's number in the network."""
    head, _, rest = name.partition("decoder.layers.")
    number, _, rest = rest.partition(".")
    if not number:
        return name
    layer = module.get_submodule(f"{head}decoder.layers.{number}")
    return f"{head}decoder.layers.{layer.layer_number - 1}" + (f".{rest}" if rest else "")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity; the host waits once."""
    if not tensors:
        return []
    # A norm needs no tensor of the size; in fp64, that no sum of finite squares is inf.
    norms = torch.stack([t.norm(dtype=torch.float64) for t in tensors.values()])
    flags = (~norms.isfinite()).tolist()  # sync
    return [name for name, is_broken in zip(tensors, flags, strict=True) if is_broken]
