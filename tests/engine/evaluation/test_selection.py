"""The epoch whose responses a reward model scores highest becomes the run's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import find_network
from engine.checkpoints.weights import load_weights
from engine.data.prompt_format import Prompt
from engine.data.prompts import prompt_examples
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.evaluation import selection
from engine.evaluation.selection import best_epoch
from engine.losses import last_readings
from engine.ranks.start import start_parallel
from engine.rollout import generate_rollout
from engine.score import read_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.settings.saving import SaveConfig
from engine.settings.sft import SelectionConfig, SFTConfig
from engine.training.network import build_network
from models.sizes import GPTSize
from tests.ranks import run_ranks
from tests.tiny import (
    EVERY_STEP,
    SIZE,
    random_network,
    rows_of,
    sft_config,
    train,
    train_until,
    weights_of,
    write_lines,
)

OTHER_SIZE = GPTSize(
    num_layers=2, hidden_size=16, num_heads=2, vocab_size=SIZE.vocab_size, context_length=48
)
SAMPLING = SamplingConfig(max_new_tokens=12, num_slots=4, cache_gib=0.01)
PROMPTS = ["the mill is", "a cheap pub near the river", "fish", "the river and the mill"]


@pytest.fixture(scope="module")
def judged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    """A run of five epochs, one or two steps each, judged by a reward model of another size."""
    folder = tmp_path_factory.mktemp("judged")
    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    parallel = start_parallel(ParallelLayout(), seed=0)
    judge = random_network("scalar", parallel, size=OTHER_SIZE, seed=3)
    Checkpointer(
        directory=folder / "judge" / "checkpoints",
        parallel=parallel,
        saving=SaveConfig(save_in_background=False),
        networks={"reward_model": judge},
        optimizers={},
        tokenizer_fingerprint=tokenizer.fingerprint(),
    ).save(0, {})
    write_lines(folder / "few.jsonl", ({"prompt": p, "response": "is cheap"} for p in PROMPTS * 3))
    write_lines(folder / "prompts.jsonl", ({"prompt": p} for p in PROMPTS))
    config = sft_config(tiny, folder / "run")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            train=folder / "few.jsonl",
            valid=folder / "few.jsonl",
            pretraining_fraction=0.0,
        ),
        epochs=5.0,
        saving=SaveConfig(keep=1, save_in_background=False),
        selection=SelectionConfig(
            reward_model=folder / "judge", num_prompts=len(PROMPTS), sampling=SAMPLING
        ),
    )


def rewards_of(run: Path) -> dict[int, float]:
    """Return {step: reward} of the run's metrics; steps count from 0."""
    return {int(r["step"]): r["valid/reward"] for r in rows_of(run) if "valid/reward" in r}


@pytest.fixture(scope="module")
def chosen(judged: SFTConfig) -> dict[str, Any]:
    """What the finished run says it has chosen."""
    train(judged)
    return json.loads((judged.directory / "selected.json").read_text())


def test_every_epoch_is_scored_and_kept(judged: SFTConfig, chosen: dict[str, Any]):
    names = {path.name for path in (judged.directory / "checkpoints").iterdir()}
    epochs = {f"epoch_{epoch:04d}" for epoch in range(1, 6)}
    # 12 demonstrations in steps of 8.
    assert names == epochs | {"latest", "selected", "step_00000008"}
    assert [e["step"] for e in chosen["epochs"]] == [2, 3, 5, 6, 8]
    rewards = [e["reward"] for e in chosen["epochs"]]
    assert rewards_of(judged.directory) == dict(zip([1, 2, 4, 5, 7], rewards, strict=True))
    assert len(set(rewards)) > 1
    assert chosen["reward"] == max(rewards)


def test_run_is_known_by_the_epoch_of_the_highest_reward(judged: SFTConfig, chosen: dict[str, Any]):
    folder = find_network(judged.directory, "policy")
    assert folder == judged.directory / chosen["checkpoint"] / "policy"
    assert folder.parent.name == f"epoch_{chosen['epoch']:04d}"
    # The reward that was written down is that of the weights that are loaded.
    parallel = start_parallel(ParallelLayout(), seed=0)
    policy = build_network("language", SIZE, parallel, numerics=Numerics())
    load_weights(policy, judged.directory, role="policy")
    judge = build_network("scalar", OTHER_SIZE, parallel, numerics=Numerics())
    load_weights(judge, Path(chosen["reward_model"]), role="reward_model")
    tokenizer = load_tokenizer(judged.directory / "tokenizer")
    asked = [Prompt(text, "\n") for text in PROMPTS]
    prompts, _ = prompt_examples(asked, tokenizer, max_prompt_length=36)
    rollout = generate_rollout(
        policy, prompts, SAMPLING, eos_id=tokenizer.eos_id, seed=0, first_sample_index=0
    )
    scores = last_readings(read_rollout(judge, rollout, 96), rollout.cu_seqlens)
    assert float(scores.double().mean()) == pytest.approx(chosen["reward"], rel=1e-6)


def test_an_earlier_epoch_wins_where_it_scores_higher(
    judged: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = iter([0.5, float("nan"), 2.0, 2.0, 1.0])
    monkeypatch.setattr(selection, "last_readings", lambda *_: torch.tensor([next(given)]))
    train(dataclasses.replace(judged, directory=tmp_path))
    assert (tmp_path / "checkpoints" / "selected").read_text() == "epoch_0003"
    ours = weights_of(tmp_path, "policy")
    third, last = (
        weights_of(tmp_path / "checkpoints" / name, "policy")
        for name in ("epoch_0003", "step_00000008")
    )
    assert all(torch.equal(ours[name], third[name]) for name in ours)
    assert not all(torch.equal(ours[name], last[name]) for name in ours)


def test_best_epoch_is_the_earliest_of_equal_rewards():
    rewards = [float("nan"), 1.0, 3.0, float("inf"), 3.0]
    epochs = [{"epoch": i, "reward": reward} for i, reward in enumerate(rewards, start=1)]
    assert best_epoch(epochs)["epoch"] == 3
    assert best_epoch(epochs[:1]) is None  # a reward that is not finite says nothing


@pytest.mark.parametrize("step", [2, 3])  # an epoch's end, and the middle of one
def test_stopped_run_chooses_as_if_it_had_not_been(
    step: int, judged: SFTConfig, chosen: dict[str, Any], tmp_path: Path
):
    config = dataclasses.replace(judged, directory=tmp_path, saving=EVERY_STEP)
    train_until(config, step)
    train(config)
    assert json.loads((tmp_path / "selected.json").read_text()) == chosen
    assert rows_of(tmp_path) == rows_of(judged.directory)
    ours, theirs = weights_of(tmp_path, "policy"), weights_of(judged.directory, "policy")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_epochs_are_kept_without_a_selection(judged: SFTConfig, tmp_path: Path):
    config = dataclasses.replace(
        judged,
        directory=tmp_path,
        selection=SelectionConfig(),
        save_every_epoch=True,
        epochs=1.5,
    )
    train(config)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"epoch_0001", "epoch_0002", "latest", "step_00000003"}
    assert not (tmp_path / "selected.json").exists()
    ours, last = (weights_of(tmp_path / "checkpoints" / n, "policy") for n in ("epoch_0002", ""))
    assert all(torch.equal(ours[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": Path("nowhere")}, "--selection.reward-model nowhere: no such"),
        ({"sampling": SamplingConfig(max_new_tokens=48)}, "leaves no room .* context of 48"),
        ({"sampling": SamplingConfig(max_new_tokens=47)}, "4 with a prompt over 1 tokens"),
    ],
)
def test_selection_that_cannot_work_is_an_error_before_training(
    changes: dict[str, Any], message: str, judged: SFTConfig, tmp_path: Path
):
    chosen = dataclasses.replace(judged.selection, **changes)
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(judged, directory=tmp_path / "run", selection=chosen))
    assert not (tmp_path / "run").exists()


def test_selection_wants_held_out_prompts(judged: SFTConfig, tmp_path: Path):
    data = dataclasses.replace(judged.data, valid=None, valid_fraction=0.0)
    config = dataclasses.replace(judged, directory=tmp_path / "run", data=data)
    with pytest.raises(UserError, match="give --selection.prompts or --data.valid"):
        train(config)
    chosen = dataclasses.replace(
        judged.selection, prompts=judged.directory.parent / "prompts.jsonl"
    )
    train(dataclasses.replace(config, selection=chosen, epochs=1.0))
    assert json.loads((tmp_path / "run" / "selected.json").read_text())["num_prompts"] == 4


def select_in_layouts(config: SFTConfig, folder: Path) -> None:
    """Train and select with two ranks, in each layout: folder/LAYOUT."""
    for name, layout in {"tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2)}.items():
        train(dataclasses.replace(config, directory=folder / name, layout=layout))


@pytest.mark.slow
def test_two_ranks_score_as_one_does(judged: SFTConfig, chosen: dict[str, Any], tmp_path: Path):
    run_ranks(select_in_layouts, 2, judged, tmp_path)
    for name in ("tp2", "pp2"):
        found = json.loads((tmp_path / name / "selected.json").read_text())
        assert found["epoch"] == chosen["epoch"]
        for ours, theirs in zip(found["epochs"], chosen["epochs"], strict=True):
            assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-4)
