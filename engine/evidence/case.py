"""What is kept of what was skipped, as files beside the weights that it left as they were.

    case.json          stage, step, network, and what was not finite
    batch.safetensors  units of its global batch, or of its rollout, which any layout packs
    config.json        the run's settings

No file of them can run code.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError, quoted
from engine.files import read_object

CASE, BATCH, CONFIG = "case.json", "batch.safetensors", "config.json"
"""The names of the files."""
_FORMAT = 1
ROLLOUT = "rollout"
"""In the place of a network: what all networks say of a rollout, which an iteration of PPO was to
learn from."""
_STAGES = ("sft", "rm", "ppo")
_ROLES = ("policy", "critic", "reward_model", ROLLOUT)
_LARGEST = 1 << 53  # of a step


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one network's optimizer that was skipped, or an iteration of PPO, all its steps."""

    stage: str
    """sft, rm or ppo."""
    step: int
    """Of the run, from 0; PPO's minibatches counted through. Of an iteration: its first."""
    position: int
    """Of its batch in the data, which seeds dropout: the step's, and of batches passed over."""
    role: str
    """Of the network in the run; ROLLOUT for an iteration."""
    reason: str
    """What was not finite."""
    loss_scale: float = 1.0
    """What the losses were multiplied by."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What was computed with besides the batch, such as the whitening of the advantages."""
    sources: dict[str, str] = field(default_factory=dict)
    """Digests of the run's own copies of networks that read the batch too, by their names there.
    None of them where nobody knows, as of before this was kept."""

    @property
    def name(self) -> str:
        """Return the name of the case's folder."""
        return f"step_{self.step:08d}_{self.role}"

    @property
    def networks(self) -> tuple[str, ...]:
        """Return the roles of the networks whose weights are kept with it."""
        return ("policy", "critic") if self.role == ROLLOUT else (self.role,)

    def as_text(self) -> str:
        """Return the case as JSON."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"


def read_case(folder: Path) -> Case:
    """Return the case in a folder; raises UserError."""
    path = folder / CASE
    found = read_object(path, max_bytes=1 << 20)
    if found.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: not a skipped step of format {_FORMAT}")
    numbers, sources = found.get("numbers"), found.setdefault("sources", {})
    checks = {
        "stage": found.get("stage") in _STAGES,
        "role": found.get("role") in _ROLES,
        "step": _is_count(found.get("step")),
        "position": _is_count(found.get("position")),
        "reason": type(found.get("reason")) is str,
        "loss_scale": _is_number(found.get("loss_scale")) and found["loss_scale"] > 0,
        "numbers": isinstance(numbers, dict) and all(map(_is_number, numbers.values())),
        "sources": isinstance(sources, dict)
        and all(isinstance(digest, str) for digest in sources.values()),
    }
    wrong = [name for name, is_right in checks.items() if not is_right]
    if wrong or found.keys() != checks.keys():
        name = (wrong or sorted(found.keys() - checks.keys()))[0]
        raise UserError(f"{path}: {quoted(name)} cannot be {quoted(found.get(name))}")
    return Case(**found)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and math.isfinite(value))
