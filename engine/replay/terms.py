"""The loss of a skipped step, term by term, from what was kept of it."""

from pathlib import Path
from typing import Any

import torch

from engine.data.examples import Unit, sequences_of
from engine.errors import UserError
from engine.evidence.case import BATCH, CONFIG, Case
from engine.feed import pack_for, step_batch
from engine.losses import clipped_value_loss, comparison_loss
from engine.ranks.parallel import Parallel
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import load_config
from engine.settings.sft import SFTConfig
from engine.sft import supervised_objectives
from engine.training.passes import Objective
from engine.update import policy_objectives
from kernels.moments import Whitening
from models.sizes import GPTSize

KeptConfig = SFTConfig | RMConfig | PPOConfig

_CONFIGS: dict[str, Any] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}
# By stage and network: the sources that there may be, and the fields of their sequences.
_SOURCES: dict[tuple[str, str], dict[str, set[str]]] = {
    ("sft", "policy"): {"loss": set(), "pretrain_loss": set()},
    ("rm", "reward_model"): {"loss": {"ranks"}},
    ("ppo", "policy"): {"episodes": {"logprobs", "advantages"}, "ptx": set()},
    ("ppo", "critic"): {"episodes": {"values", "returns"}},
}


def config_in(folder: Path, case: Case) -> KeptConfig:
    """Return the settings of the run whose step it was; raises UserError."""
    return load_config(_CONFIGS[case.stage], folder / CONFIG)


def check_sources(folder: Path, case: Case, sources: dict[str, list[Unit]], size: GPTSize) -> None:
    """Raise UserError where a batch is not one that such a network learns from."""
    path, allowed = folder / BATCH, _SOURCES.get((case.stage, case.role), {})
    if not sources or not sources.keys() <= allowed.keys():
        raise UserError(f"{path}: no batch of the {case.role} in {case.stage}")
    if case.stage == "ppo" and "episodes" not in sources:
        raise UserError(f"{path}: a batch without episodes")
    for name, units in sources.items():
        for sequence in (sequence for unit in units for sequence in sequences_of(unit)):
            if int(sequence.tokens.max()) >= size.vocab_size:
                raise UserError(f"{path}: tokens beyond the vocabulary of {size.vocab_size}")
            if len(sequence.tokens) > size.context_length:
                raise UserError(f"{path}: sequences beyond the context of {size.context_length}")
            if not allowed[name] <= sequence.fields.keys():
                raise UserError(f"{path}: sequences without {', '.join(sorted(allowed[name]))}")


def terms_of(
    case: Case, config: KeptConfig, sources: dict[str, list[Unit]], parallel: Parallel
) -> dict[str, Objective]:
    """Return the terms of the step's loss by name, on this rank's part of the batch."""
    budget = config.micro_batch_tokens
    if isinstance(config, SFTConfig):
        # In the order of the run: dropout is drawn in it.
        names = [name for name in _SOURCES["sft", "policy"] if name in sources]
        taken = {name: step_batch(sources[name], parallel, budget) for name in names}
        fraction = config.data.pretraining_fraction
        return dict(zip(taken, supervised_objectives(taken, fraction), strict=True))
    if isinstance(config, RMConfig):
        units = sources["loss"]
        loss = comparison_loss(len(units))
        return {"loss": Objective(batches=pack_for(units, parallel, budget), loss=loss)}
    episodes = step_batch(sources["episodes"], parallel, budget)
    num_targets = torch.tensor(float(episodes.num_targets), device=parallel.device)
    if case.role == "critic":
        loss = clipped_value_loss(num_targets, cliprange=config.value_cliprange)
        return {"value_loss": Objective(batches=episodes.batches, loss=loss)}
    text = step_batch(sources["ptx"], parallel, budget) if "ptx" in sources else None
    whitening = _whitening(case, parallel)
    found = policy_objectives(config, episodes.batches, num_targets, whitening, text)
    return dict(zip(("policy_loss", "ptx_loss"), found, strict=False))


def _whitening(case: Case, parallel: Parallel) -> Whitening | None:
    if not case.numbers:
        return None
    try:
        values = [case.numbers[name] for name in Whitening._fields]
    except KeyError as error:
        raise UserError(f"{case.name}: whitening without its {error}") from None
    return Whitening(*(torch.tensor(value, device=parallel.device) for value in values))
