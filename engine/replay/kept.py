"""What was kept of a case, read, and held to what can be rerun: settings, batch and networks."""

import dataclasses
from pathlib import Path
from typing import Any

from engine.checkpoints.found import network_at
from engine.checkpoints.weights import load_weights
from engine.data.examples import Unit, begins_alike, sequences_of
from engine.errors import UserError
from engine.evidence.case import BATCH, CONFIG, ROLLOUT, Case
from engine.ranks.parallel import Parallel
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import load_config
from engine.settings.sft import SFTConfig
from engine.training.network import Network, build_network
from models.sizes import GPTSize

KeptConfig = SFTConfig | RMConfig | PPOConfig

SOURCES: dict[tuple[str, str], dict[str, set[str]]] = {
    ("sft", "policy"): {"loss": set(), "pretrain_loss": set()},
    ("rm", "reward_model"): {"loss": {"ranks"}},
    ("ppo", "policy"): {"episodes": {"logprobs", "advantages"}, "ptx": set()},
    ("ppo", "critic"): {"episodes": {"values", "returns"}},
    ("ppo", ROLLOUT): {"episodes": {"sampled_logprobs", "has_eos"}},
}
"""By stage and network: the sources that there may be, and the fields of their sequences."""
_CONFIGS: dict[str, Any] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


def config_in(folder: Path, case: Case) -> KeptConfig:
    """Return the settings of the run whose step it was; raises UserError."""
    return load_config(_CONFIGS[case.stage], folder / CONFIG)


def check_sources(folder: Path, case: Case, sources: dict[str, list[Unit]], size: GPTSize) -> None:
    """Raise UserError where a batch is not one that such a network learns from, or reads."""
    path, allowed = folder / BATCH, SOURCES.get((case.stage, case.role), {})
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
        if case.stage == "rm" and not all(begins_alike(sequences_of(unit)) for unit in units):
            raise UserError(f"{path}: completions that do not go on from one prompt")


def network_in(folder: Path, config: KeptConfig, parallel: Parallel) -> Network:
    """Return the network of a folder named for its role, as it was, finite or not; raises
    UserError. All ranks call together."""
    found = network_at(folder, folder.name, strict=True)
    # Operations that are computed again would be watched out of order; the numbers are the same.
    numerics = dataclasses.replace(config.numerics, recompute="none")
    dropout = getattr(config, "dropout", 0.0)
    network = build_network(found.kind, found.size, parallel, numerics=numerics, dropout=dropout)
    load_weights(network, folder, role=folder.name, strict=True, must_be_finite=False)
    return network
