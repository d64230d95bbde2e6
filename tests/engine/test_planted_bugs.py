"""Bugs of PPO, each planted in a run, and the alarm that finds it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import ppo, score
from engine.advantage import Advantages
from engine.data.batches import PackedBatch
from engine.identity.inputs import Inputs
from engine.rollout import Rollout
from engine.score import Scored
from engine.settings.alarms import AlarmConfig
from engine.settings.numerics import Numerics
from engine.training.network import Network
from tests.tiny import ADAM, ppo_config, train

# The networks are random: few of their responses end, and policy and reference are far apart.
ALARMS = AlarmConfig(patience=1, min_eos_rate=0.0, max_clip_fraction=1.0, max_kl=1e3)


CAUTIONS = {"few_held_out", "evaluation"}  # of so few prompts and iterations

# What a bug does to log-probs must stand out from what rounding does to them.
IN_DTYPES = pytest.mark.parametrize(
    "numerics", [Numerics(), Numerics(dtype="bf16")], ids=["fp32", "bf16"]
)


def alarms_of(files: Path, run: Path, **changes: Any) -> set[str]:
    """Run two iterations and return the names of the alarms that rang."""
    settings = {"alarms": ALARMS, "num_shown": 0, "ema_decay": 0.5}  # an average of so few steps
    train(ppo_config(files, run, **{**settings, **changes}))
    path = run / "alarms.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["name"] for line in lines} - CAUTIONS


def wrap(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Put change(original, ...) in the place of a function that engine/ppo.py calls."""
    original = getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *a, **named: change(original, *a, **named))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["scored", "sampled"])
def test_sound_run_is_silent(dtype: str, source: str, tiny: Path, tmp_path: Path):
    # Several packings, and iterations enough that the policy is no longer what it began as.
    settings = {"micro_batch_tokens": 64, "iterations": 4, "numerics": Numerics(dtype=dtype)}
    settings["policy_logprobs"] = source
    found = alarms_of(tiny, tmp_path, **settings)
    if dtype == "fp16":  # looks for its loss scale, which is said
        found -= {"loss_scale_search", "skipped_steps"}
    assert found == set()


@IN_DTYPES
def test_temperature_that_scoring_forgets(numerics, tiny: Path, tmp_path: Path, monkeypatch):
    sampling = dataclasses.replace(ppo_config(tiny, tmp_path).sampling, temperature=0.7)
    settings = {"sampling": sampling, "numerics": numerics}
    assert alarms_of(tiny, tmp_path / "sound", **settings) == set()
    wrap(
        monkeypatch,
        "score_rollout",
        lambda score, rollout, config, **roles: score(
            rollout,
            dataclasses.replace(
                config, sampling=dataclasses.replace(config.sampling, temperature=1.0)
            ),
            **roles,
        ),
    )
    assert "logprob_mismatch" in alarms_of(tiny, tmp_path / "bug", **settings)


@IN_DTYPES
@pytest.mark.parametrize("source", ["scored", "sampled"])
def test_weights_of_the_iteration_before(
    numerics, source: str, tiny: Path, tmp_path: Path, monkeypatch
):
    before: list[torch.Tensor] = []

    def stale(generate: Callable[..., Rollout], policy: Network, *a: Any, **named: Any) -> Rollout:
        weights = [p.data for p in policy.modules[0].parameters()]
        now = [w.clone() for w in weights]
        torch._foreach_copy_(weights, before or now)
        before[:] = now
        try:
            return generate(policy, *a, **named)
        finally:
            torch._foreach_copy_(weights, now)

    wrap(monkeypatch, "generate_rollout", stale)
    found = alarms_of(tiny, tmp_path, numerics=numerics, policy_logprobs=source)
    assert "logprob_mismatch" in found
    # Scoring and training agree; what sampling said is of other weights than those that train.
    assert ("first_ratio" in found) == (source == "sampled")


@IN_DTYPES
def test_positions_that_start_at_one(numerics, tiny: Path, tmp_path: Path, monkeypatch):
    forward = score.forward

    def shifted(network: Network, batches: list[PackedBatch], **named: Any) -> list[torch.Tensor]:
        moved = [dataclasses.replace(b, positions=b.positions + 1) for b in batches]
        return forward(network, moved, **named)

    monkeypatch.setattr(score, "forward", shifted)
    found = alarms_of(tiny, tmp_path, numerics=numerics)
    assert "logprob_mismatch" in found
    assert ("first_ratio" in found) == (numerics.dtype != "fp32")  # there ratios are sampling's


@IN_DTYPES
def test_dropout_left_on(numerics, tiny: Path, tmp_path: Path, monkeypatch):
    wrap(
        monkeypatch,
        "build_network",
        lambda build, *a, **named: build(*a, **{**named, "dropout": 0.2}),
    )
    assert "first_ratio" in alarms_of(tiny, tmp_path, numerics=numerics)


@IN_DTYPES
def test_old_logprobs_shifted_by_one(numerics, tiny: Path, tmp_path: Path, monkeypatch):
    def shifted(score: Callable[..., Scored], *arguments: Any, **roles: Any) -> Scored:
        scored = score(*arguments, **roles)
        return dataclasses.replace(scored, logprobs=scored.logprobs.roll(1))

    wrap(monkeypatch, "score_rollout", shifted)
    found = alarms_of(tiny, tmp_path, numerics=numerics)
    assert "first_ratio" in found
    assert ("logprob_mismatch" in found) == (numerics.dtype != "fp32")  # fp32 checks sampling's


def test_responses_of_another_network(tiny: Path, tmp_path: Path, monkeypatch):
    loaded: dict[str, Network] = {}
    load = Inputs.load

    def keep(inputs: Inputs, name: str, network: Network) -> None:
        load(inputs, name, network)
        loaded[name] = network

    monkeypatch.setattr(Inputs, "load", keep)
    wrap(
        monkeypatch,
        "generate_rollout",
        lambda generate, policy, *a, **named: generate(loaded["reference"], *a, **named),
    )
    assert "logprob_mismatch" in alarms_of(tiny, tmp_path / "sampled")
    assert "negative_kl" in alarms_of(tiny, tmp_path / "scored", policy_logprobs="scored")


def test_end_tokens_that_sampling_does_not_know(tiny: Path, tmp_path: Path, monkeypatch):
    alarms = dataclasses.replace(ALARMS, min_eos_rate=0.3)
    sampling = dataclasses.replace(
        ppo_config(tiny, tmp_path).sampling, stop_token_ids=tuple(range(1, 30))
    )
    settings = {"alarms": alarms, "sampling": sampling}
    assert alarms_of(tiny, tmp_path / "sound", **settings) == set()
    wrap(
        monkeypatch,
        "generate_rollout",
        lambda generate, policy, prompts, sampling, **named: generate(
            policy, prompts, dataclasses.replace(sampling, stop_token_ids=()), **named
        ),
    )
    assert alarms_of(tiny, tmp_path / "bug", **settings) == {"eos_rate"}


def test_whitening_that_moves_the_prompts(tiny: Path, tmp_path: Path, monkeypatch):
    def whitened(estimate: Callable[..., Advantages], *a: Any, **named: Any) -> Advantages:
        found = estimate(*a, **named)
        moved = (found.advantages - found.whitening.mean) * found.whitening.rstd
        return dataclasses.replace(found, advantages=moved)

    wrap(monkeypatch, "estimate_advantages", whitened)
    assert "pad_leak" in alarms_of(tiny, tmp_path)


def test_learning_rate_that_throws_the_critic_off(tiny: Path, tmp_path: Path):
    wild = dataclasses.replace(ADAM, lr=3.0, schedule="constant")
    found = alarms_of(tiny, tmp_path, critic_adam=wild, minibatch_size=8, iterations=3)
    assert "value_loss" in found
