"""A skipped step or iteration, rerun from what was kept: where its numbers stopped being finite."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.whole import newest_whole
from engine.data.batches import PackedBatch
from engine.data.unit_file import read_units
from engine.environment import world_size_of_environment
from engine.errors import UserError
from engine.evidence.case import BATCH, ROLLOUT, Case, read_case
from engine.printable import say
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_step
from engine.ranks.start import rearranged, start_parallel
from engine.replay.kept import KeptConfig, check_sources, config_in, network_in
from engine.replay.report import of_batch, of_pass, of_weights
from engine.replay.scoring import rerun_scoring
from engine.replay.terms import terms_of
from engine.replay.watch import PassWatch
from engine.settings.layout import ParallelLayout
from engine.settings.replay import ReplayConfig
from engine.training.diagnosis import Diagnosis, diagnose
from engine.training.network import Network
from engine.training.passes import LanguageLoss, Objective, accumulate, finish_gradients
from engine.training.reduce import StepMetrics
from engine.training.trainable import make_trainable
from kernels.linear_logprobs import TokenLoss
from models.sizes import Kind

_NOT_REPRODUCED = 1
"""Exit status where all numbers are finite this time."""


def replay(config: ReplayConfig) -> None:
    """Rerun what was skipped, and say what in it is not finite; SystemExit(1) where nothing is."""
    if config.step is None:
        raise UserError("--step is required: a folder in a run's folder skipped")
    folder = config.step
    case = read_case(folder)
    stage_config = config_in(folder, case)
    layout = config.layout or _layout(case, stage_config)
    parallel = start_parallel(layout, stage_config.seed, config.waiting, config)
    _, damage = newest_whole([folder])
    if damage:
        raise UserError(damage)
    if case.role == ROLLOUT:
        parallels = _of_kinds(parallel, config, stage_config)
        lines, is_reproduced = rerun_scoring(folder, case, stage_config, parallels)
    else:
        lines, is_reproduced = _rerun_step(folder, case, stage_config, parallel)
    lines.append("reproduced" if is_reproduced else "NOT reproduced: all numbers are finite here")
    if parallel.is_writer:
        say("\n".join(lines))
    if not is_reproduced:
        raise SystemExit(_NOT_REPRODUCED)


def _rerun_step(
    folder: Path, case: Case, config: KeptConfig, parallel: Parallel
) -> tuple[list[str], bool]:
    """Run a step's passes; return lines on them, and whether a loss or gradient is not finite."""
    network = _network(folder, case, config, parallel)
    sources = read_units(folder / BATCH)
    check_sources(folder, case, sources, network.size)
    terms = terms_of(case, config, sources, parallel)
    lines = [
        f"step {case.step} of the {case.role} ({case.stage}) was skipped: {case.reason}",
        f"weights: {of_weights(network)}",
        of_batch(sources),
    ]
    watch = PassWatch(network)
    found = _run(watch, case, terms)
    lines += of_pass("forward", watch.forward) + of_pass("backward", watch.backward)
    lines.append(f"whole step: {_said(found)}")
    if len(terms) > 1:
        for name, term in terms.items():
            lines.append(f"{name} alone: {_said(_run(PassWatch(network), case, {name: term}))}")
    return lines, bool(found.losses or found.gradients)


def _layout(case: Case, config: KeptConfig) -> ParallelLayout:
    if world_size_of_environment() == 1:
        return ParallelLayout()
    critic_layout = getattr(config, "critic_layout", None) if case.role == "critic" else None
    return critic_layout or config.layout


def _of_kinds(
    parallel: Parallel, config: ReplayConfig, stage_config: KeptConfig
) -> dict[Kind, Parallel]:
    """Return this rank's place in the layouts of language and of scalar networks: the run's two,
    unless one is named or this process is alone."""
    critic_layout = getattr(stage_config, "critic_layout", None)
    if critic_layout is None or config.layout or world_size_of_environment() == 1:
        return {"language": parallel, "scalar": parallel}
    return {"language": parallel, "scalar": rearranged(parallel, critic_layout)}


def _network(folder: Path, case: Case, config: KeptConfig, parallel: Parallel) -> Network:
    """Return the step's network, ready for a backward pass."""
    network = network_in(folder / case.role, config, parallel)
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


def _said(found: Diagnosis) -> str:
    return str(found) if found.losses or found.gradients else "finite"
