"""What a stage is made from, as its config names it: networks, files of data, and all else that a
resume is held to."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import named
from engine.files import MAX_SHOWN_PATH
from engine.process.software import PACKAGES
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig

RunConfig = SFTConfig | RMConfig | PPOConfig

_NAMES: dict[Any, tuple[str, ...]] = {
    SFTConfig: (
        *("init_from", "selection.reward_model", "data.train", "data.valid"),
        *("data.pretraining", "data.pretraining_valid", "selection.prompts"),
    ),
    RMConfig: ("init_from", "data.train", "data.valid", "data.demonstrations"),
    PPOConfig: (
        *("policy", "reference", "reward_model", "data.prompts", "data.valid"),
        *("data.pretraining", "data.pretraining_valid"),
    ),
}

UNCHANGING = {
    "init_from": "whether a run starts from a network is settled with its first step",
    "data.train": "with demonstrations and without them are two kinds of run",
    "selection.reward_model": "an epoch is selected among all epochs or not at all",
}
"""Options of networks and files that a run has to its end, or never, and why. What lies there may
be accepted as another."""


@dataclass(frozen=True, kw_only=True)
class NamedNetwork:
    """A network that a stage starts from, or reads all along."""

    path: Path
    """A run, one of its checkpoints, a network's folder in one, or a Hugging Face folder."""
    role: str
    """Of the network there."""
    kept_as: str
    """The name of its copy in the run's folder; two names may share one."""
    strict: bool
    """Whether a damaged newest checkpoint there is an error."""
    size: str = ""
    """The named size that it must have; "": any."""


def networks_of(config: RunConfig, policy_kept_as: str = "") -> dict[str, NamedNetwork]:
    """Return the networks that a stage is made from, by the names of their options.

    policy_kept_as: the name of a PPO run's copy of its policy; "" where it has none yet. Then one
    copy is policy and reference where both paths mean the same now.

    What PPO reads as long as it runs is taken strictly: another reference, because one checkpoint
    was damaged, would be another run.
    """
    if isinstance(config, PPOConfig):
        anchor = config.reference or config.policy
        found = {
            "policy": ("policy", config.policy, policy_kept_as or _policy_copy(config)),
            "reference": ("policy", anchor, "reference"),
            "reward_model": ("reward_model", config.reward_model, "reward_model"),
        }
        sizes = {"policy": config.size, "reward_model": config.reward_model_size}
        return {
            name: NamedNetwork(
                path=path, role=role, kept_as=kept_as, strict=True, size=sizes.get(name, "")
            )
            for name, (role, path, kept_as) in found.items()
        }
    networks = {}
    if config.init_from is not None:
        networks["init_from"] = NamedNetwork(
            path=config.init_from,
            role="policy",
            kept_as="init_from",
            strict=config.saving.strict,
        )
    if isinstance(config, SFTConfig) and config.selection.reward_model is not None:
        networks["selection.reward_model"] = NamedNetwork(
            path=config.selection.reward_model,
            role="reward_model",
            kept_as="selection_reward_model",
            strict=True,
        )
    return networks


def _policy_copy(config: PPOConfig) -> str:
    """Return the name that the copy of PPO's policy has where its paths decide."""
    found = {os.path.realpath(path) for path in (config.policy, config.reference or config.policy)}
    return "reference" if len(found) == 1 else "policy"


def files_of(config: RunConfig) -> dict[str, Path]:
    """Return the files of data that a stage reads, by the names of their options."""
    data: Any = config.data
    if isinstance(config, PPOConfig):
        found = {"data.prompts": data.prompts, "data.valid": data.valid}
        if config.ptx_coef > 0:
            found["data.pretraining"] = data.pretraining
        found["data.pretraining_valid"] = data.pretraining_valid
    else:
        found = {"data.train": data.train}
        if data.train is not None:
            found["data.valid"] = data.valid
    if isinstance(config, RMConfig):
        found["data.demonstrations"] = data.demonstrations
    elif isinstance(config, SFTConfig):
        if data.train is None or data.pretraining_fraction > 0:
            found["data.pretraining"] = data.pretraining
            found["data.pretraining_valid"] = data.pretraining_valid
        if config.selection.reward_model is not None:
            found["selection.prompts"] = config.selection.prompts
    return {name: path for name, path in found.items() if path is not None}


def stage_of(config: RunConfig) -> str:
    """Return the name of a config's stage: sft, rm or ppo."""
    return type(config).__name__.removesuffix("Config").lower()


def names_of(kind: type[RunConfig]) -> tuple[str, ...]:
    """Return all names that --accept-changed may give for a stage. The tokenizer is none: a run
    keeps its own."""
    return (*_NAMES[kind], "code", "python", *PACKAGES)


def beginning(config: RunConfig, step: int | None) -> str:
    """Return from what a run starts, or behind which step it goes on."""
    where = named(config.directory, MAX_SHOWN_PATH)
    if step is not None:
        return f"{where}: goes on behind step {step}"
    if isinstance(config, PPOConfig):
        policy = named(config.policy, MAX_SHOWN_PATH)
        return f"{where}: from {policy} against {named(config.reward_model, MAX_SHOWN_PATH)}"
    if config.init_from is not None:
        return f"{where}: from {named(config.init_from, MAX_SHOWN_PATH)}"
    return f"{where}: from nothing"
