"""A gradient that is not finite costs its step, and a few in a row end the run."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from engine.checkpoints.retention import step_name
from engine.errors import UserError
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.optimizer import Optimizer, StepResult
from engine.training.skipped import SkippedSteps
from models.sizes import Kind
from tests.tiny import (
    ADAM,
    EVERY_STEP,
    ppo_config,
    rm_config,
    rows_of,
    sft_config,
    train,
    train_until,
    weights_of,
)

# Stage: its config with what makes four steps or more of it, whose gradient is spoiled, who is
# saved, and the metric that counts.
TRAIN = "train/skipped_steps"
POLICY, CRITIC = "update/policy_skipped_steps", "update/critic_skipped_steps"
STAGES: dict[str, tuple[Callable, dict, Kind, str, str]] = {
    "sft": (sft_config, {"epochs": 0.8}, "language", "policy", TRAIN),
    "pretraining": (sft_config, {"epochs": 0.8}, "language", "policy", TRAIN),
    "rm": (rm_config, {"epochs": 1.2}, "scalar", "reward_model", TRAIN),
    "ppo_ptx": (ppo_config, {"ptx_coef": 0.5}, "language", "policy", POLICY),
    "ppo": (ppo_config, {"ptx_coef": 0.0}, "language", "policy", POLICY),
    "ppo_critic": (
        ppo_config,
        {"ptx_coef": 0.0},
        "scalar",
        "critic",
        CRITIC,
    ),
}


def config_of(stage: str, files: Path, folder: Path, **changes):
    make_config, more, *_ = STAGES[stage]
    config = make_config(files, folder, saving=EVERY_STEP, **more, **changes)
    if stage == "pretraining":
        data = dataclasses.replace(config.data, train=None, pretraining_fraction=0.0)
        config = dataclasses.replace(config, data=data)
    return config


def state_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Weights, masters, moments and Adam's counts of steps."""
    optimizer.prepare_state()
    adam = [state for o in optimizer._distributed() for state in o.optimizer.state.values()]
    tensors = [
        *(p for module in optimizer.network.modules for p in module.parameters()),
        *optimizer.state_tensors(),
        *(state["step"] for state in adam),
    ]
    return [tensor.detach().clone() for tensor in tensors]


@dataclasses.dataclass
class Spoiled:
    """What the steps of the network whose gradients were spoiled did."""

    results: list[StepResult] = dataclasses.field(default_factory=list)
    changed: list[bool] = dataclasses.field(default_factory=list)


def spoil(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, steps: Iterable[int], value: float = math.nan
) -> Spoiled:
    """Put `value` into one number of the gradient of a network, in those of its steps, from 0."""
    seen, step = Spoiled(), Optimizer.step

    def spoiled_step(self: Optimizer, position: int, metrics=None) -> StepResult:
        if self.network.kind != kind:
            return step(self, position, metrics)
        if len(seen.results) in steps:
            *_, parameter = self.network.modules[0].parameters()
            parameter.main_grad.view(-1)[0] = value
        before = state_of(self)
        result = step(self, position, metrics)
        pairs = zip(before, state_of(self), strict=True)
        seen.changed.append(not all(torch.equal(a, b) for a, b in pairs))
        seen.results.append(result)
        return result

    monkeypatch.setattr(Optimizer, "step", spoiled_step)
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_nan_in_a_gradient_is_skipped_and_counted_and_weights_stay_finite(
    stage: str, dtype: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, kind, role, metric = STAGES[stage]
    seen = spoil(monkeypatch, kind, [2])
    train(config_of(stage, tiny, tmp_path, numerics=Numerics(dtype=dtype)))
    was_skipped = [result.was_skipped for result in seen.results]
    # fp16 may skip a step of its own at the start, as the loss scale is still too large.
    assert was_skipped[2] and not was_skipped[-1]
    assert sum(was_skipped) == 1 or dtype == "fp16"
    assert seen.changed == [not skipped for skipped in was_skipped]
    assert math.isnan(seen.results[2].grad_norm)
    assert rows_of(tmp_path)[-1][metric] == sum(was_skipped)
    weights = weights_of(tmp_path, role)
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_gradient_is_skipped_too(
    value: float, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = spoil(monkeypatch, "scalar", [0], value)
    train(config_of("rm", tiny, tmp_path))
    assert seen.changed == [False, True, True, True]


def test_average_stays_where_the_policys_step_is_skipped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(config_of("ppo", tiny, tmp_path / "short", ema_decay=0.5, iterations=1))
    spoil(monkeypatch, "language", [2, 3])  # all of the second iteration
    train(config_of("ppo", tiny, tmp_path / "spoiled", ema_decay=0.5))
    for role in ("policy", "ema"):
        short, spoiled = (weights_of(tmp_path / run, role) for run in ("short", "spoiled"))
        assert all(torch.equal(spoiled[name], short[name]) for name in short), role
    policy = weights_of(tmp_path / "short", "policy")
    assert not any(torch.equal(policy[name], short[name]) for name in short)  # it has yet to follow


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo_ptx", "ppo_critic"])
def test_a_few_in_a_row_end_the_run_and_save_nothing(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, kind, role, metric = STAGES[stage]
    adam = dataclasses.replace(ADAM, max_skipped_steps=2)
    names = ("adam", "critic_adam") if stage.startswith("ppo") else ("adam",)
    config = config_of(stage, tiny, tmp_path, **dict.fromkeys(names, adam))
    seen = spoil(monkeypatch, kind, [2, 3, 4, 5])
    with pytest.raises(
        UserError, match=f"gradient of the {role} was not finite in 2 optimizer steps"
    ):
        train(config)
    assert [result.was_skipped for result in seen.results] == [False, False, True, True]
    row = rows_of(tmp_path)[-1]  # the last step is on record
    assert row[metric] == 2 and any(math.isnan(row[n]) for n in row if n.endswith("grad_norm"))
    latest = (tmp_path / "checkpoints" / "latest").read_text()
    assert latest == ("step_00000001" if stage.startswith("ppo") else "step_00000003")
    assert all(w.isfinite().all() for w in weights_of(tmp_path, role).values())


def test_error_names_step_network_checkpoint_and_what_to_try(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adam = dataclasses.replace(ADAM, max_skipped_steps=1)
    spoil(monkeypatch, "scalar", [1])
    with pytest.raises(UserError) as error:
        train(config_of("rm", tiny, tmp_path, adam=adam))
    for words in ("step 1:", "reward_model", str(tmp_path / "checkpoints/step_00000001"), "lower"):
        assert words in str(error.value)


def test_a_resumed_run_ends_at_the_step_where_an_unbroken_one_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adam = dataclasses.replace(ADAM, max_skipped_steps=3)
    config = config_of("rm", tiny, tmp_path, adam=adam)
    with monkeypatch.context() as patch:
        spoil(patch, "scalar", [1, 2, 3])
        train_until(config, 2)  # two steps are saved, the second of which was skipped
    seen = spoil(monkeypatch, "scalar", [0, 1, 2])
    with pytest.raises(UserError, match="step 3: .* in 3 optimizer steps in a row"):
        train(config)
    assert len(seen.results) == 2
    assert [row["train/skipped_steps"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]


def test_checkpoints_of_before_a_row_stay_until_a_step_is_taken(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kept() -> list[str]:
        return sorted(path.name[-1] for path in (tmp_path / "checkpoints").glob("step_*"))

    adam = dataclasses.replace(ADAM, max_skipped_steps=3)
    config = config_of("sft", tiny, tmp_path, adam=adam)
    config = dataclasses.replace(config, epochs=1.4)
    with monkeypatch.context() as patch:
        spoil(patch, "language", [2, 3, 4])
        with pytest.raises(UserError, match="3 optimizer steps in a row"):
            train(config)
    # Weights that broke in the last step that was taken would be in all but the first of them.
    assert kept() == ["1", "2", "3", "4"]
    with monkeypatch.context() as patch:
        spoil(patch, "language", [0])
        with pytest.raises(UserError):  # the same command, which breaks again
            train(config)
    assert kept() == ["1", "2", "3", "4"]
    train(config)
    assert len(kept()) == 2


def test_with_one_kept_the_one_before_stays_until_a_step_shows_that_it_is_good(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saving = SaveConfig(save_every=1, keep=1)
    adam = dataclasses.replace(ADAM, max_skipped_steps=2)
    config = dataclasses.replace(config_of("sft", tiny, tmp_path, adam=adam), saving=saving)
    spoil(monkeypatch, "language", [2, 3])  # the weights of step 2 may be why
    with pytest.raises(
        UserError, match=r"step_00000003 \(older .*: step_00000002, step_00000001\)"
    ):
        train(config)
    monkeypatch.undo()
    train(config)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000004"]


def test_search_for_a_loss_scale_leaves_the_checkpoints_of_before_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adam = dataclasses.replace(ADAM, min_loss_scale=2.0**14)
    config = config_of("sft", tiny, tmp_path, adam=adam, numerics=Numerics(dtype="fp16"))
    config = dataclasses.replace(config, epochs=4.5)
    seen = spoil(monkeypatch, "language", range(9, 99), math.inf)
    with pytest.raises(UserError, match="5 optimizer steps in a row"):
        train(config)
    assert len(seen.results) > 9 + ADAM.max_skipped_steps  # it was searched for
    last = max(step for step, result in enumerate(seen.results) if not result.was_skipped)
    names = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert {step_name(last + 1), step_name(last)} <= names


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_run_that_learned_nothing_is_no_success(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, kind, role, _ = STAGES[stage]
    adam = dataclasses.replace(ADAM, max_skipped_steps=99)
    config = config_of(stage, tiny, tmp_path, adam=adam)
    with monkeypatch.context() as patch:
        spoil(patch, kind, range(99))
        with pytest.raises(UserError, match=f"learned nothing: .* {role} was not finite in any of"):
            train(config)
        with pytest.raises(UserError, match="learned nothing"):  # from its last checkpoint
            train(config)
    train(config)


def test_a_step_that_is_taken_ends_the_row():
    skipped = SkippedSteps(limit=2)
    for was_skipped in (True, False, True):
        skipped.count(was_skipped=was_skipped, is_explained=False)
    assert (skipped.total, skipped.in_a_row, skipped.is_stuck) == (2, 1, False)
    skipped.count(was_skipped=True, is_explained=True)
    assert (skipped.total, skipped.is_stuck) == (3, False)
    skipped.count(was_skipped=True, is_explained=False)
    assert skipped.is_stuck


def test_at_least_one_step_may_be_skipped():
    with pytest.raises(UserError, match="max_skipped_steps must be at least 1"):
        dataclasses.replace(ADAM, max_skipped_steps=0)
