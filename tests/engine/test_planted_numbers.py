"""Numbers that are not finite, planted where each may arise in PPO and in generation: they are
named, counted, and reach nothing that stays."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import engine.ppo
from engine.errors import UserError
from engine.rollout import Rollout
from engine.score import Scored
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.settings.sft import SelectionConfig
from tests.engine.replay.planted import HUGE, STUCK, plant, stuck_run
from tests.ranks import run_ranks
from tests.tiny import EVERY_STEP, ppo_config, rows_of, sft_config, train, train_until, weights_of

NAMES = {
    "logprobs": "the policy's log-probs",
    "values": "the critic's values",
    "ref_logprobs": "the reference's log-probs",
    "raw_scores": "the reward model's scores",
}


def spoil_scores(
    patch: pytest.MonkeyPatch, name: str, iterations: list[int], value: float, sample: int = 3
) -> None:
    """Put `value` into one sample's scores, log-probs or values, in some iterations."""
    score, calls = engine.ppo.score_rollout, iter(range(99))

    def spoiled(rollout: Rollout, *args, **kwargs) -> Scored:
        scored = score(rollout, *args, **kwargs)
        if next(calls) not in iterations:
            return scored
        names = ("raw_scores", "scores") if name == "raw_scores" else (name,)
        columns = {each: getattr(scored, each).clone() for each in names}
        where = sample if name == "raw_scores" else int(rollout.cu_seqlens[sample + 1]) - 1
        for column in columns.values():
            column[where] = value
        return dataclasses.replace(scored, **columns)

    patch.setattr(engine.ppo, "score_rollout", spoiled)


def alarms_in(run: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines()]
    return [row for row in rows if row["name"] == name]


def progress_of(run: Path) -> dict:
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    return json.loads((latest / "progress.json").read_text())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_an_iteration_whose_scores_are_not_finite_takes_no_step(
    name: str, value: float, tiny: Path, tmp_path: Path
):
    with pytest.MonkeyPatch.context() as patch:
        spoil_scores(patch, name, [1], value)
        config = ppo_config(tiny, tmp_path, iterations=3, saving=EVERY_STEP, ptx_coef=0.0)
        train_until(config, 2)
        spoilt = {role: weights_of(tmp_path, role) for role in ("policy", "critic", "ema")}
        progress = progress_of(tmp_path)
        train(config)
    (alarm,) = alarms_in(tmp_path, "skipped_rollout")
    assert alarm["step"] == 1
    assert f"{NAMES[name]} are not finite in 1 of 8 responses: sample 3 (" in alarm["message"]
    short = ppo_config(tiny, tmp_path / "short", iterations=1, ptx_coef=0.0)
    train(short)
    for role, weights in spoilt.items():
        before = weights_of(tmp_path / "short", role)
        assert all(torch.equal(weights[name], before[name]) for name in before), role
    assert progress["kl_coef"] == progress_of(tmp_path / "short")["kl_coef"]
    assert progress["skipped_rollouts"]["total"] == 1
    rows = rows_of(tmp_path)
    assert [row["update/skipped_rollouts"] for row in rows] == [0, 1, 1]
    assert "update/policy_loss" not in rows[1]
    assert all(math.isfinite(value) for value in rows[2].values())


def test_a_few_such_iterations_in_a_row_end_the_run_also_over_a_resume(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adams = {"adam": STUCK, "critic_adam": STUCK}
    config = ppo_config(tiny, tmp_path, iterations=4, saving=EVERY_STEP, **adams)
    with monkeypatch.context() as patch:
        spoil_scores(patch, "values", [1, 2], math.nan)
        train_until(config, 2)
    spoil_scores(monkeypatch, "values", [0], math.nan)
    with pytest.raises(UserError) as error:
        train(config)
    for words in ("iteration 2: ", "2 iterations in a row", "the critic's values", "step_00000002"):
        assert words in str(error.value)
    with monkeypatch.context() as patch:
        patch.undo()
        train(config)  # the same command goes on, once the cause is gone
    assert progress_of(tmp_path)["step"] == 4


def test_checkpoints_of_before_a_row_of_such_iterations_stay_also_over_a_resume(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kept() -> list[int]:
        return sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*"))

    adam = dataclasses.replace(STUCK, max_skipped_steps=3)
    config = ppo_config(
        tiny, tmp_path, iterations=6, saving=EVERY_STEP, adam=adam, critic_adam=adam
    )
    with monkeypatch.context() as patch:
        spoil_scores(patch, "values", [2, 3], math.nan)
        train_until(config, 4)
    assert kept() == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        spoil_scores(patch, "values", [0], math.nan)
        with pytest.raises(UserError, match="beside it: .*step_00000002, step_00000001"):
            train(config)
    assert kept() == [1, 2, 3, 4]
    train(config)
    assert kept() == [5, 6]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_reward_model_of_huge_weights_ends_in_words(dtype: str, tiny: Path, tmp_path: Path):
    said = stuck_run("ppo", tiny, tmp_path, dtype)
    assert "2 iterations in a row" in said
    # The critic starts from it, and is read first.
    assert "the critic's values are not finite in" in said


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_logits_that_are_not_finite_end_ppo_in_words(dtype: str, tiny: Path, tmp_path: Path):
    policy = plant(tiny, tmp_path / "planted", "policy", HUGE[dtype])
    config = ppo_config(tiny, tmp_path / "run", policy=policy, numerics=Numerics(dtype=dtype))
    with pytest.raises(UserError) as error:
        train(config)
    for words in ("iteration 0: the logits of sample ", "No checkpoint has been", "lower the lear"):
        assert words in str(error.value)


def test_newest_checkpoint_is_named_where_logits_are_not_finite(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = ppo_config(tiny, tmp_path, saving=EVERY_STEP)
    train_until(config, 1)

    def fail(*_: object, **__: object) -> Rollout:
        raise FloatingPointError("the logits of sample 8 are not finite")

    with monkeypatch.context() as patch:
        patch.setattr(engine.ppo, "generate_rollout", fail)
        with pytest.raises(UserError, match=f"sample 8.*{tmp_path / 'checkpoints/step_00000001'}"):
            train(config)
    train(config)
    assert progress_of(tmp_path)["step"] == 2


def test_logits_that_are_not_finite_end_a_selection_in_words(tiny: Path, tmp_path: Path):
    def fail(*_: object, **__: object) -> Rollout:
        raise FloatingPointError("the logits of sample 0 are not finite")

    selection = SelectionConfig(
        reward_model=tiny / "reward_model", sampling=SamplingConfig(max_new_tokens=8)
    )
    config = sft_config(tiny, tmp_path, selection=selection, saving=EVERY_STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.evaluation.selection.generate_rollout", fail)
        with pytest.raises(UserError, match=r"step 2: the logits of sample 0.*step_00000002"):
            train(config)


LAYOUTS: dict[str, ParallelLayout] = {
    "tp2": ParallelLayout(tp=2),
    "dp2": ParallelLayout(),
    "pp2": ParallelLayout(pp=2),
}


def ended_on(layout: str, files: Path, policy: Path, run: Path) -> str:
    with pytest.raises(UserError) as error:
        train(ppo_config(files, run, policy=policy, layout=LAYOUTS[layout]))
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_end_in_the_same_words_where_logits_of_one_are_not_finite(
    layout: str, tiny: Path, tmp_path: Path
):
    policy = plant(tiny, tmp_path / "planted", "policy", HUGE["fp32"])
    said = run_ranks(ended_on, 2, layout, tiny, policy, tmp_path / "run")
    assert len(set(said)) == 1 and "iteration 0: the logits of sample " in said[0]


def skipped_on(layout: str, files: Path, run: Path) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        spoil_scores(patch, "ref_logprobs", [0], math.nan)
        train(ppo_config(files, run, layout=LAYOUTS[layout], ptx_coef=0.0))
    return []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_skip_an_iteration_together(layout: str, tiny: Path, tmp_path: Path):
    run_ranks(skipped_on, 2, layout, tiny, tmp_path)
    assert [row["update/skipped_rollouts"] for row in rows_of(tmp_path)] == [1, 1]
