"""Four small models under a residency."""

import dataclasses
from collections.abc import Callable

import torch

from engine.ranks.parallel import Parallel
from engine.residency.residency import Residency
from engine.settings.residency import ResidencyConfig
from engine.settings.sampling import SamplingConfig
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from engine.update import Learner
from tests.tiny import (
    ADAM,
    SIZE,
    random_network,
)

SAMPLING = SamplingConfig(max_new_tokens=8, num_slots=4, cache_gib=0.01)


CHOICES = {
    "resident": ResidencyConfig(),
    "host": ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host"),
    "sharded": ResidencyConfig(reference="sharded", reward_model="sharded", optimizer="host"),
    "critic_only": ResidencyConfig(critic="host"),
    "one_each": ResidencyConfig(reference="sharded", reward_model="host"),
}


def numbers(network: Network) -> list[torch.Tensor]:
    """A copy of the weights that are in the network's memory."""
    return [p.detach().clone() for module in network.modules for p in module.parameters()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def nothing() -> None:
    """Observe nobody."""


def loader(source: Network) -> Callable[[Network | None], Network]:
    """Stand in for a checkpoint: what Residency loads is `source`'s weights."""

    def load(into: Network | None) -> Network:
        if into is None:
            return source
        pairs = zip(into.modules, source.modules, strict=True)
        for module, other in pairs:
            module.load_state_dict(other.state_dict())
        into.mark_changed()
        return into

    return load


@dataclasses.dataclass(kw_only=True)
class Scene:
    """Four models under a residency, and what each of them was given."""

    residency: Residency
    networks: dict[str, Network]
    given: dict[str, list[torch.Tensor]]
    learner: Learner


def scene(parallel: Parallel, config: ResidencyConfig, *, dtype: str = "bf16") -> Scene:
    kinds = {"policy": "language", "reference": "language"}
    made = {
        role: random_network(kinds.get(role, "scalar"), parallel, seed=seed, dtype=dtype)
        for seed, role in enumerate(("policy", "critic", "reference", "reward_model"))
    }
    given = {role: numbers(network) for role, network in made.items()}
    policy, critic = (Optimizer(made[r], ADAM, total_steps=5) for r in ("policy", "critic"))
    ema = EMA(policy, 0.9)
    residency = Residency(config, policy=policy, critic=critic, ema=ema)
    networks = {"policy": made["policy"], "critic": made["critic"]}
    for role in ("reference", "reward_model"):
        networks[role] = residency.frozen(role, SIZE, loader(made[role]))
    learner = Learner(policy=policy, critic=critic, ema=ema, pretraining=None)
    return Scene(residency=residency, networks=networks, given=given, learner=learner)
