"""Runs of the three stages with spikes planted at positions of their data, not at steps: a run that
passes the data over does not meet them."""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from engine import rm, sft, update
from engine.ranks.parallel import Parallel
from engine.ranks.seeds import seed_for_step
from engine.settings.adam import AdamConfig
from engine.settings.saving import SaveConfig
from engine.settings.spikes import SpikeConfig
from engine.training.optimizer import Optimizer, StepResult
from engine.training.reduce import StepMetrics
from models.sizes import Kind
from tests.tiny import ADAM, ppo_config, rm_config, sft_config

SPIKES = SpikeConfig(policy="rewind", warmup=2, window=4)
STEADY: AdamConfig = dataclasses.replace(ADAM, lr=1e-4)

# By name: a stage's config, of eight steps or iterations with a checkpoint every other; whose
# gradient leaps; who is saved; the metric that counts; the optimizer steps of one of the eight.
STAGES: dict[str, tuple[Callable, dict, Kind, tuple[str, ...], str, int]] = {
    "sft": (
        sft_config,
        {"epochs": 1.6, "adam": STEADY, "dropout": 0.1},
        "language",
        ("policy",),
        "train/spiked_steps",
        1,
    ),
    "rm": (
        rm_config,
        {"epochs": 2.4, "adam": STEADY},
        "scalar",
        ("reward_model",),
        "train/spiked_steps",
        1,
    ),
    "ppo": (
        ppo_config,
        {"iterations": 8, "ptx_coef": 0.5, "num_shown": 8, "show_every": 1},
        "language",
        ("policy", "critic", "ema"),
        "update/policy_spiked_steps",
        2,
    ),
    "ppo_critic": (
        ppo_config,
        {"iterations": 8, "ptx_coef": 0.0},
        "scalar",
        ("policy", "critic", "ema"),
        "update/critic_spiked_steps",
        2,
    ),
}


def spiky_config(stage: str, files: Path, folder: Path, **changes: Any) -> Any:
    """Return a stage's config of eight steps that saves every other one."""
    make_config, more, *_ = STAGES[stage]
    if stage.startswith("ppo"):
        steady = dataclasses.replace(STEADY, schedule="constant")
        more = {**more, "adam": steady, "critic_adam": steady}
    more = {"saving": SaveConfig(save_every=2), "spikes": SPIKES, **more}
    return make_config(files, folder, **{**more, **changes})


def plant(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, positions: Collection[int], factor: float = 1e4
) -> list[StepResult]:
    """Multiply the gradients of a network at positions of its data, by `factor`; return what its
    steps did, as they do it."""
    position, results = [-1], list[StepResult]()
    step, zero_gradients = Optimizer.step, Optimizer.zero_gradients

    def seed(parallel: Parallel, number: int) -> None:
        position[0] = number
        seed_for_step(parallel, number)

    def zeroed(self: Optimizer) -> None:
        if self.network.kind == kind:  # before the backward pass, whose ranks may sum as they go
            is_planted = position[0] in positions
            self.network.scale_losses((lambda loss: factor * loss) if is_planted else None)
        zero_gradients(self)

    def noted(self: Optimizer, number: int, metrics: StepMetrics | None = None) -> StepResult:
        result = step(self, number, metrics)
        if self.network.kind == kind:
            results.append(result)
        return result

    for module in (sft, rm, update):
        monkeypatch.setattr(module, "seed_for_step", seed)
    monkeypatch.setattr(Optimizer, "zero_gradients", zeroed)
    monkeypatch.setattr(Optimizer, "step", noted)
    return results


def alarms_of(run: Path) -> list[dict[str, Any]]:
    """Return what a run has in alarms.jsonl about spikes."""
    path = run / "alarms.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["name"] in ("spike", "rewind")]
