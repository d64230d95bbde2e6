"""A skipped step, rerun from what was kept of it: where its numbers stopped being finite."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoints.found import network_at
from engine.checkpoints.weights import load_weights
from engine.checkpoints.whole import newest_whole
from engine.data.batches import PackedBatch
from engine.data.examples import Unit, sequences_of
from engine.data.unit_file import read_units
from engine.environment import world_size_of_environment
from engine.errors import UserError
from engine.evidence.case import BATCH, Case, read_case
from engine.printable import say
from engine.ranks.seeds import seed_for_step
from engine.ranks.start import start_parallel
from engine.replay.terms import KeptConfig, check_sources, config_in, terms_of
from engine.replay.watch import PassWatch
from engine.settings.layout import ParallelLayout
from engine.settings.replay import ReplayConfig
from engine.training.diagnosis import Diagnosis, diagnose, named_weights
from engine.training.network import Network, build_network
from engine.training.passes import LanguageLoss, Objective, accumulate, finish_gradients
from engine.training.reduce import StepMetrics
from engine.training.trainable import make_trainable
from kernels.linear_logprobs import TokenLoss

_NOT_REPRODUCED = 1
"""Exit status where all numbers are finite this time."""


def replay(config: ReplayConfig) -> None:
    """Rerun a skipped step, and say what in it is not finite; SystemExit(1) where nothing is."""
    if config.step is None:
        raise UserError("--step is required: a folder in a run's folder skipped")
    folder = config.step
    case = read_case(folder)
    stage_config = config_in(folder, case)
    layout = config.layout or _layout(case, stage_config)
    parallel = start_parallel(layout, stage_config.seed, config.waiting)
    _, damage = newest_whole([folder])
    if damage:
        raise UserError(damage)
    network = _network(folder, case, stage_config, parallel)
    sources = read_units(folder / BATCH)
    check_sources(folder, case, sources, network.size)
    terms = terms_of(case, stage_config, sources, parallel)
    lines = [
        f"step {case.step} of the {case.role} ({case.stage}) was skipped: {case.reason}",
        _of_weights(network),
        _of_batch(sources),
    ]
    watch = PassWatch(network)
    found = _run(watch, case, terms)
    lines += _of_passes(watch) + [f"whole step: {_said(found)}"]
    if len(terms) > 1:
        for name, term in terms.items():
            lines.append(f"{name} alone: {_said(_run(PassWatch(network), case, {name: term}))}")
    is_reproduced = bool(found.losses or found.gradients)
    lines.append("reproduced" if is_reproduced else "NOT reproduced: all numbers are finite here")
    if parallel.is_writer:
        say("\n".join(lines))
    if not is_reproduced:
        raise SystemExit(_NOT_REPRODUCED)


def _layout(case: Case, config: KeptConfig) -> ParallelLayout:
    if world_size_of_environment() == 1:
        return ParallelLayout()
    critic_layout = getattr(config, "critic_layout", None) if case.role == "critic" else None
    return critic_layout or config.layout


def _network(folder: Path, case: Case, config: KeptConfig, parallel: Any) -> Network:
    """Return the network as it was, finite or not, ready for a backward pass."""
    found = network_at(folder / case.role, case.role, strict=True)
    # Operations that are computed again would be watched out of order; the numbers are the same.
    numerics = dataclasses.replace(config.numerics, recompute="none")
    dropout = getattr(config, "dropout", 0.0)
    network = build_network(found.kind, found.size, parallel, numerics=numerics, dropout=dropout)
    load_weights(network, folder / case.role, role=case.role, strict=True, must_be_finite=False)
    make_trainable(network)
    is_scaled = network.dtype is torch.float16
    network.scale_losses((lambda loss: loss * case.loss_scale) if is_scaled else None)
    return network


@dataclasses.dataclass(frozen=True)
class _NamedLoss:
    """A language loss whose name the watch is told before a micro-batch's forward pass."""

    name: str
    inner: LanguageLoss
    watch: PassWatch

    def token_loss(self, batch: PackedBatch) -> TokenLoss:
        """Return the inner loss's."""
        self.watch.term = self.name
        return self.inner.token_loss(batch)

    def metrics(self, batch: PackedBatch, terms: Tensor) -> StepMetrics:
        """Return the inner loss's."""
        return self.inner.metrics(batch, terms)


def _watched(name: str, term: Objective, watch: PassWatch) -> Objective:
    inner: Any = term.loss
    if not callable(inner):
        return dataclasses.replace(term, loss=_NamedLoss(name, inner, watch))

    def loss(batch: PackedBatch, readings: Tensor) -> tuple[Tensor, StepMetrics]:
        value, metrics = inner(batch, readings)
        watch.follow(value)
        return value, metrics

    return dataclasses.replace(term, loss=loss)


def _run(watch: PassWatch, case: Case, terms: Mapping[str, Objective]) -> Diagnosis:
    """Run the passes of some terms as the step did, and return what is not finite."""
    network = watch.network
    for chunk in network.chunks:
        chunk.zero_grad_buffer()
    seed_for_step(network.parallel, case.position)
    watch.term = next(iter(terms))
    objectives = [_watched(name, term, watch) for name, term in terms.items()]
    with watch.watching():
        metrics = accumulate(network, objectives)
    finish_gradients(network)
    return diagnose(network, metrics)


def _of_weights(network: Network) -> str:
    """Return a line on the weights of all ranks: the largest, and those that are not finite."""
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
    return f"weights: {state}; the largest is {largest:.4g} in {where}"


def _of_batch(sources: Mapping[str, Sequence[Unit]]) -> str:
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


def _of_passes(watch: PassWatch) -> list[str]:
    """Return what each rank found first in its forward pass and in its backward pass."""
    lines = []
    for what in ("forward", "backward"):
        told = _gathered(getattr(watch, what))
        found = [f"rank {rank}: {each}" for rank, each in enumerate(told) if each is not None]
        lines += [f"{what}, first not finite on {each}" for each in found] or [f"{what}: finite"]
    return lines


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _said(found: Diagnosis) -> str:
    return str(found) if found.losses or found.gradients else "finite"
