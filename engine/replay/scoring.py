"""A rollout that no step was taken on, scored again: which network made what is not finite.

Policy and critic are those that were kept with it; reference and reward model are the run's own
copies, RUN/sources, beside the folder RUN/skipped that the rollout lies in.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.advantage import broken_samples, estimate_advantages, unsound_samples
from engine.checkpoints.manifest import read_manifest
from engine.checkpoints.sources import digest_of_network
from engine.data.batches import PackedBatch
from engine.data.examples import Example, Unit, sequences_of
from engine.data.unit_file import read_units
from engine.errors import UserError
from engine.evidence.case import BATCH, Case
from engine.feed import pack_for
from engine.generation.sequence import Response
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.replay.kept import KeptConfig, check_sources, network_in
from engine.replay.report import of_batch, of_pass, of_weights
from engine.replay.watch import Finding, PassWatch
from engine.rollout import Rollout, join_responses
from engine.score import read_rollout, scored_from
from engine.settings.ppo import PPOConfig
from engine.training.network import Network
from models.sizes import Kind

_SOURCES = {  # in RUN/sources
    "reference": Path("reference/policy"),
    "reward_model": Path("reward_model/reward_model"),
}
_SHOWN = 8  # characters of a digest; our choice
_NUM_NAMED = 8  # samples that are named; our choice: a line on screen holds them


def rerun_scoring(
    folder: Path, case: Case, config: KeptConfig, parallels: dict[Kind, Parallel]
) -> tuple[list[str], bool]:
    """Score a rollout as its iteration did; return lines on it, and whether anything of what is
    learned from it is not finite. All ranks call together; raises UserError.

    parallels: this rank's place in the layout of the networks of each kind.
    """
    if not isinstance(config, PPOConfig):
        raise UserError(f"{folder}: {case.stage} learns from no rollout")
    if "kl_coef" not in case.numbers:
        raise UserError(f"{folder}: a rollout without its kl_coef")
    sources = read_units(folder / BATCH)
    rollout = _rollout_in(folder / BATCH, sources.get("episodes", []), parallels["language"])
    lines = [
        f"the rollout of step {case.step} ({case.stage}) was not learned from: {case.reason}",
        of_batch(sources),
    ]
    readings: dict[str, Tensor] = {}
    lines += json.loads(said_by_first_rank(lambda: _sameness(folder, case)))
    for role, (kind, path) in _networks(folder).items():
        network = network_in(path, config, parallels[kind])
        if network.kind != kind:
            raise UserError(f"{path}: a {network.kind} network, where a {kind} one is read")
        check_sources(folder, case, sources, network.size)
        readings[role], found = _read(network, role, rollout, config)
        lines += [f"{role}: weights {of_weights(network)}", *found]
    scored = scored_from(rollout, config, readings, num_checked=len(rollout))
    kl_coef = float(case.numbers["kl_coef"])
    advantages = estimate_advantages(rollout, scored, config, kl_coef=kl_coef)
    unsound = unsound_samples(rollout, scored, advantages)
    lines += [
        f"{name}: not finite in {len(samples)} of {len(rollout)} responses: {_named(samples)}"
        if samples
        else f"{name}: finite"
        for name, samples in unsound.items()
    ]
    return lines, any(unsound.values())


def _networks(folder: Path) -> dict[str, tuple[Kind, Path]]:
    """Return the networks that read the rollout of a folder, in the order of the iteration."""
    sources = folder.resolve().parents[1] / "sources"
    return {
        "policy": ("language", folder / "policy"),
        "critic": ("scalar", folder / "critic"),
        "reference": ("language", sources / _SOURCES["reference"]),
        "reward_model": ("scalar", sources / _SOURCES["reward_model"]),
    }


def _sameness(folder: Path, case: Case) -> str:
    """Return lines, as JSON, on networks of RUN/sources of which nobody knows whether they are
    those that read the rollout; UserError where they are others: the run began anew, from them."""
    lines = []
    for name, path in _SOURCES.items():
        copy = folder.resolve().parents[1] / "sources" / path.parent
        if not copy.exists():  # which whoever loads it says
            continue
        read, there = case.sources.get(name), digest_of_network(read_manifest(copy), path.name)
        if read is None:
            lines.append(f"{name}: nobody knows whether {copy} is the one that read this rollout")
        elif read != there:
            raise UserError(
                f"{copy}: not the {name} that read this rollout ({read[:_SHOWN]} -> "
                f"{there[:_SHOWN]}): the run has begun anew since; put that back to rerun it"
            )
    return json.dumps(lines)


def _rollout_in(path: Path, units: Sequence[Unit], parallel: Parallel) -> Rollout:
    """Return the rollout whose responses lie in a file; raises UserError."""
    episodes = [sequence for unit in units for sequence in sequences_of(unit)]
    prompts, responses = [], []
    for index, episode in enumerate(episodes):
        start, logprobs = episode.prompt_length, episode.fields.get("sampled_logprobs")
        has_eos: Any = episode.fields.get("has_eos")
        is_response = start < len(episode.tokens) and type(has_eos) is bool
        if not is_response or not isinstance(logprobs, np.ndarray):
            raise UserError(f"{path}: sequences that are no responses of a rollout")
        prompts.append(Example(tokens=episode.tokens[:start], prompt_length=start))
        responses.append(
            Response(
                sample_index=index,
                tokens=episode.tokens[start:],
                logprobs=logprobs[start:],
                has_eos=has_eos,
            )
        )
    if not responses:
        raise UserError(f"{path}: no rollout")
    return join_responses(prompts, responses, parallel.device)


def _read(
    network: Network, role: str, rollout: Rollout, config: PPOConfig
) -> tuple[Tensor, list[str]]:
    """Return what a network says of a rollout, [T], and lines on where that was first not finite,
    and in which samples."""
    is_language, budget = network.kind == "language", config.micro_batch_tokens
    watch = PassWatch(network)
    with _numbering(watch), watch.watching():
        readings = read_rollout(
            network,
            rollout,
            budget,
            temperature=config.sampling.temperature if is_language else 1.0,
        )
    finding = watch.forward
    if finding is not None:
        batch = pack_for(rollout.examples, network.parallel, budget)[int(finding.term)]
        samples = _samples_of(finding, batch, broken_samples(readings, rollout))
        term = _named(samples) if samples else "padding"
        finding = dataclasses.replace(finding, term=term)
    return readings, of_pass(f"{role}: forward", finding)


def _samples_of(finding: Finding, batch: PackedBatch, broken: Sequence[int]) -> list[int]:
    """Return the samples of a micro-batch that a finding in it is of: by its rows where they are
    all tokens; where ranks have a part of them, those whose output is broken."""
    ids = torch.repeat_interleave(batch.sequence_ids, batch.cu_seqlens.diff().long()).tolist()
    found = set(ids).intersection(broken) or set(ids)
    if finding.num_rows >= len(ids):  # more where a pipeline pads its rows
        found = {ids[row] for row in finding.rows if row < len(ids)}
    return sorted(found - {-1})


@contextlib.contextmanager
def _numbering(watch: PassWatch) -> Iterator[None]:
    """Run a block in which the watch's term is the number of the micro-batch that is under way."""

    def counting() -> Any:
        number = -1

        def hook(module: torch.nn.Module, arguments: tuple) -> None:
            nonlocal number
            number += 1
            watch.term = str(number)

        return hook

    handles = [module.register_forward_pre_hook(counting()) for module in watch.network.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(samples: Sequence[int]) -> str:
    more = f" and {len(samples) - _NUM_NAMED} more" if len(samples) > _NUM_NAMED else ""
    listed = ", ".join(map(str, samples[:_NUM_NAMED]))
    return f"sample{'s' if len(samples) > 1 else ''} {listed}{more}"
