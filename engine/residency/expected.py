"""How many bytes each model should take in each phase, on the device and on the host, from the
configuration alone. Imports neither torch nor megatron."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.settings.residency import ResidencyConfig

PHASES = ("rollout", "score", "update")
PARTNERS = {"reference": "policy", "reward_model": "critic"}
"""Whose memory a frozen model borrows."""


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What a model takes on one rank."""

    weights: int
    """All chunks of this rank."""
    gradients: int = 0
    """fp32 buffers, whole on every data-parallel rank; 0 for a frozen model."""
    optimizer: int = 0
    """This rank's fp32 masters (where they are not the weights themselves), both moments and the
    averaged weights."""
    layer: int = 0
    """The largest layer."""
    ends: int = 0
    """What lies outside of the layers, of the chunk that has most: embeddings, final norm, head."""
    dp: int = 1
    """Data-parallel ranks that share the model."""


@dataclass(frozen=True, kw_only=True)
class ExpectedBytes:
    """Bytes by row, "role part"; without key-value cache and activations."""

    device: dict[str, dict[str, int]]
    """By row and phase."""
    passing: dict[str, int]
    """By row: what of it is there only while its model is read in scoring, one model at a time."""
    host: dict[str, int]
    """By row, from the first iteration to the end."""

    def device_total(self, phase: str) -> int:
        """Return the most bytes of all rows at once in a phase."""
        total = sum(row[phase] for row in self.device.values())
        if phase == "score" and self.passing:
            total -= sum(self.passing.values()) - max(self.passing.values())
        return total

    @property
    def host_total(self) -> int:
        """The bytes of all rows."""
        return sum(self.host.values())


def expected_bytes(config: ResidencyConfig, models: Mapping[str, ModelBytes]) -> ExpectedBytes:
    """Return what the phases take, from the bytes of the four models by role.

    "generation" is the policy's copy in another layout, where there is one.
    """
    device: dict[str, dict[str, int]] = {}
    host: dict[str, int] = {}
    passing: dict[str, int] = {}
    is_parked = config.optimizer == "host"
    for role in ("policy", "critic"):
        model = models[role]
        is_away = role == "critic" and config.critic == "host"
        device[f"{role} weights"] = _in_phases(
            model.weights, rollout=0 if is_away else model.weights
        )
        device[f"{role} gradients"] = _in_phases(model.gradients, rollout=0, score=0)
        device[f"{role} optimizer"] = (
            _in_phases(model.optimizer, rollout=0, score=0)
            if is_parked
            else _in_phases(model.optimizer)
        )
        host[f"{role} weights"] = model.weights if is_away else 0
        host[f"{role} optimizer"] = model.optimizer if is_parked else 0
    for role, partner in PARTNERS.items():
        row, model = f"{role} weights", models[role]
        placement = getattr(config, role)
        borrows = placement == "host" and model.weights == models[partner].weights
        if placement == "resident":
            device[row] = _in_phases(model.weights)
        elif placement == "sharded":
            shard = -(-model.weights // model.dp)
            passing[row] = model.ends + 2 * model.layer
            device[row] = _in_phases(shard, score=shard + passing[row])
        else:
            passing[row] = 0 if borrows else model.weights
            device[row] = _in_phases(0, score=passing[row])
        host[row] = model.weights if placement == "host" else 0
        if borrows:  # the partner's weights wait on the host for their turn
            host[f"{partner} weights"] = models[partner].weights
    if "generation" in models:
        device["generation weights"] = _in_phases(0, rollout=models["generation"].weights)
    return ExpectedBytes(device=device, passing=passing, host=host)


def _in_phases(num_bytes: int, **other: int) -> dict[str, int]:
    return {phase: other.get(phase, num_bytes) for phase in PHASES}
