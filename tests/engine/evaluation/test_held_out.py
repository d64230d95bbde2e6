"""What PPO holds out: the numbers are those of the policy as it is, and looking changes nothing."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.weights import load_weights
from engine.data.pretraining import open_token_file
from engine.data.prompt_format import Prompt
from engine.data.prompts import prompt_examples, read_prompts
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.evaluation.held_out import HeldOut
from engine.losses import last_readings, mean_language_loss
from engine.metrics import plot_curves
from engine.ranks.start import start_parallel
from engine.rollout import Rollout, generate_rollout
from engine.score import read_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.residency import ResidencyConfig
from engine.settings.saving import SaveConfig
from engine.training.network import Network, build_network
from tests.ranks import run_ranks
from tests.tiny import (
    EVERY_STEP,
    SIZE,
    Killed,
    ppo_config,
    rows_of,
    train,
    weights_of,
    write_lines,
)

NAMES = {"reward_mean", "kl", "response_tokens", "eos_rate", "pretrain_loss"}
LOOKING = "engine.evaluation.held_out"
HOST = ResidencyConfig(reference="host", reward_model="host", critic="host", optimizer="host")


def with_data(config: PPOConfig, **changes: Any) -> PPOConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def without_looking(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("valid/")} for row in rows_of(run)]


def assert_learned_alike(run: Path, other: Path) -> None:
    """Compare all that training says, and the weights it ends with, to the last bit."""
    assert without_looking(run) == without_looking(other)
    for role in ("policy", "critic", "ema"):
        ours, theirs = weights_of(run, role), weights_of(other, role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), role


def held_out_of(files: Path) -> list[Prompt]:
    """Return the third of the prompts that tests.tiny holds out, by the rule's words."""
    prompts = dict.fromkeys(read_prompts(files / "prompts.jsonl")[0])
    digests = {p: hashlib.sha256(f"0 {p.text}".encode()).digest() for p in prompts}
    return [p for p, digest in digests.items() if int.from_bytes(digest[:8]) < 0.35 * 2**64]


def network_at(run: Path, role: str, kind: Any) -> Network:
    network = build_network(
        kind, SIZE, start_parallel(ParallelLayout(), seed=0), numerics=Numerics()
    )
    load_weights(network, run, role=role)
    return network


def test_numbers_are_of_the_policy_that_a_checkpoint_holds(tiny: Path, tmp_path: Path):
    config = ppo_config(tiny, tmp_path / "run", iterations=3)
    train(config)
    rows = rows_of(config.directory)
    due = [{k for k in row if k.startswith("valid/")} for row in rows]
    assert due == [set(), {f"valid/{name}" for name in NAMES}, {f"valid/{name}" for name in NAMES}]
    assert '"valid/seconds"' in (config.directory / "metrics.jsonl").read_text()

    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    texts = held_out_of(tiny)
    assert len(texts) == 6
    prompts, _ = prompt_examples(texts, tokenizer, max_prompt_length=40)
    policy = network_at(config.directory, "policy", "language")
    rollout = generate_rollout(
        policy,
        prompts,
        dataclasses.replace(config.sampling, num_slots=2),  # in several batches
        eos_id=tokenizer.eos_id,
        seed=config.seed + 1_000_003,
        first_sample_index=0,
    )
    reward_model = network_at(tiny / "reward_model", "reward_model", "scalar")
    scores = last_readings(read_rollout(reward_model, rollout, 128), rollout.cu_seqlens)
    reference = network_at(tiny / "reference", "policy", "language")
    ratio = (read_rollout(policy, rollout, 128) - read_rollout(reference, rollout, 128))[
        rollout.response_mask
    ]
    text = open_token_file(tiny / "pretraining_valid.jsonl", tokenizer, tmp_path / "tokens")
    found = rows[-1]
    assert found["valid/reward_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert found["valid/kl"] == pytest.approx(float(ratio.sum()) / len(prompts), rel=1e-4)
    lengths = rollout.response_lengths
    assert found["valid/response_tokens"] == sum(lengths) / len(lengths)
    assert found["valid/eos_rate"] == float(rollout.has_eos.double().mean())
    assert found["valid/pretrain_loss"] == pytest.approx(
        mean_language_loss(policy, text.sequences(32), 128), rel=1e-5
    )
    assert found["valid/reward_mean"] != found["score/reward_mean"]
    assert found["valid/reward_mean"] != rows[1]["valid/reward_mean"]
    assert plot_curves(config.directory) is not None  # with curves of two points beside three


@pytest.mark.parametrize("residency", [ResidencyConfig(), HOST])
def test_looking_changes_nothing_that_is_learned(
    residency: ResidencyConfig, tiny: Path, tmp_path: Path
):
    base = ppo_config(tiny, tmp_path / "never", iterations=3, saving=EVERY_STEP)
    base = dataclasses.replace(base, residency=residency)
    train(with_data(base, valid_fraction=0.0, pretraining_valid=None))
    valid = write_lines(tmp_path / "valid.jsonl", [{"prompt": "the fish"}, {"prompt": "a pub"}])
    looking = dataclasses.replace(base, directory=tmp_path / "always", eval_every=1)
    train(with_data(looking, valid=valid))
    assert not any("valid/" in key for row in rows_of(tmp_path / "never") for key in row)
    assert all("valid/kl" in row for row in rows_of(tmp_path / "always"))
    assert_learned_alike(tmp_path / "always", tmp_path / "never")


def test_equal_prompts_are_on_one_side(tiny: Path, tmp_path: Path, monkeypatch):
    seen: dict[str, list[tuple[int, ...]]] = {"engine.ppo": [], LOOKING: []}

    def noting(name: str) -> Callable[..., Rollout]:
        def note(policy: Network, prompts: list, *arguments: Any, **named: Any) -> Rollout:
            seen[name].extend(tuple(p.tokens.tolist()) for p in prompts)
            return generate_rollout(policy, prompts, *arguments, **named)

        return note

    for name in seen:
        monkeypatch.setattr(f"{name}.generate_rollout", noting(name))
    lines = (tiny / "prompts.jsonl").read_text().splitlines()
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines, *lines[::-1], *lines[:5]]))
    config = ppo_config(tiny, tmp_path / "run", rollout_batch_size=40, minibatch_size=20)
    train(with_data(config, prompts=path))
    trained, held_out = set(seen["engine.ppo"]), seen[LOOKING]
    num_held_out = len(held_out_of(tiny))
    assert len(held_out) == len(set(held_out)) == num_held_out
    assert len(trained) == len(set(lines)) - num_held_out  # all others were answered
    assert not trained & set(held_out)


@pytest.mark.parametrize(("most", "num_answered"), [(3, 3), (9, 4)])
def test_a_file_gives_its_first_distinct_prompts(
    most: int, num_answered: int, tiny: Path, tmp_path: Path, capsys
):
    texts = ["the mill", "a pub", "the mill", "fish", "the river"]
    valid = write_lines(tmp_path / "valid.jsonl", [{"prompt": text} for text in texts])
    config = ppo_config(tiny, tmp_path / "run", iterations=1, saving=EVERY_STEP)
    train(with_data(config, valid=valid, num_valid=most))
    shown = capsys.readouterr().out
    assert f"{valid}: 5 records, {num_answered} to be answered" in shown
    assert f"prompts (valid): {num_answered} kept" in shown
    known = json.loads((tmp_path / "run" / "identity.json").read_text())["data"]
    assert known["data.valid"]["records"] == 5
    assert known["data.valid"]["kept"] == num_answered
    assert known["data.prompts"]["kept"] == 24  # none of them is held out


def test_run_killed_while_it_looks_goes_on_bit_for_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = ppo_config(tiny, tmp_path / "whole", iterations=3, saving=EVERY_STEP)
    train(whole)
    numbers = HeldOut.numbers

    def look_and_die(self: HeldOut) -> dict[str, float]:
        numbers(self)
        raise Killed

    stopped = dataclasses.replace(whole, directory=tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HeldOut, "numbers", look_and_die)
        train(stopped)
    assert len(rows_of(stopped.directory)) == 1
    train(stopped)
    assert rows_of(stopped.directory) == rows_of(whole.directory)
    assert_learned_alike(stopped.directory, whole.directory)


def test_a_checkpoint_is_kept_by_a_held_out_number(tiny: Path, tmp_path: Path):
    saving = SaveConfig(
        save_every=1, keep=1, keep_highest="valid/reward_mean", keep_lowest="valid/kl"
    )
    train(ppo_config(tiny, tmp_path, iterations=4, eval_every=1, saving=saving))
    rows = rows_of(tmp_path)
    steps = range(1, 5)
    best = max(steps, key=lambda step: (rows[step - 1]["valid/reward_mean"], step))
    nearest = min(steps, key=lambda step: (rows[step - 1]["valid/kl"], -step))
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {f"step_{step:08d}" for step in (best, nearest, 4)}
    assert len(kept) > 1


OLD = {"data": ("valid", "valid_fraction", "num_valid", "pretraining_valid"), "": ("eval_every",)}


def test_run_from_before_nothing_is_held_out_of_in_silence(tiny: Path, tmp_path: Path):
    """A run begun when all prompts were trained on goes on so, or not at all."""
    config = with_data(
        ppo_config(tiny, tmp_path / "run", saving=EVERY_STEP),
        valid_fraction=0.0,
        pretraining_valid=None,
    )
    whole = dataclasses.replace(config, directory=tmp_path / "whole")
    train(whole)
    train(dataclasses.replace(config, iterations=1))
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    for part, names in OLD.items():
        for name in names:
            del (saved[part] if part else saved)[name]
    path.write_text(json.dumps(saved))
    with pytest.raises(
        UserError, match=r"data\.valid_fraction 0\.0, not 0\.35\n(.|\n)*--data\.valid-fraction 0\.0"
    ):
        train(with_data(config, valid_fraction=0.35))
    train(config)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


# Logits that are not finite


def poisoned(generate: Callable[..., Rollout], rank: int) -> Callable[..., Rollout]:
    """Return what generates with a weight of one rank that is NaN, and puts it back."""

    def generate_poisoned(policy: Network, *arguments: Any, **named: Any) -> Rollout:
        (*_, weight) = policy.modules[0].parameters()
        kept = weight.detach().clone()
        if policy.parallel.rank == rank:
            weight.data.fill_(math.nan)
        try:
            return generate(policy, *arguments, **named)
        finally:
            weight.data.copy_(kept)

    return generate_poisoned


def train_poisoned(config: PPOConfig, rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{LOOKING}.generate_rollout", poisoned(generate_rollout, rank))
        train(config)


def assert_unanswered(run: Path) -> None:
    """Look that a run has said that its held-out prompts were not answered, and has ended."""
    *_, row = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert [row[f"valid/{name}"] for name in sorted(NAMES - {"pretrain_loss"})] == [None] * 4
    assert row["valid/pretrain_loss"] > 0
    alarms = [json.loads(line) for line in (run / "alarms.jsonl").read_text().splitlines()]
    (reason,) = {a["message"] for a in alarms if a["name"] == "held_out"}
    assert reason.startswith("held-out prompts are not answered: the logits of sample ")
    assert "non_finite" in {a["name"] for a in alarms}


def test_logits_that_are_not_finite_cost_the_numbers_and_no_more(tiny: Path, tmp_path: Path):
    config = ppo_config(tiny, tmp_path / "run", eval_every=1, saving=EVERY_STEP)
    train_poisoned(config, 0)
    assert_unanswered(tmp_path / "run")
    further = dataclasses.replace(config, iterations=3)
    train(further)  # from a checkpoint whose metrics are not all finite
    assert rows_of(tmp_path / "run")[-1]["valid/kl"] > 0
    train(dataclasses.replace(further, directory=tmp_path / "sound"))
    assert_learned_alike(tmp_path / "run", tmp_path / "sound")


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "pp2": {"layout": ParallelLayout(pp=2)},
    "pp2_generates_in_dp2": {
        "layout": ParallelLayout(pp=2),
        "generation_layout": ParallelLayout(),
        "residency": HOST,
    },
}


def train_in_layouts(files: Path, folder: Path, valid: Path) -> None:
    """Under each layout: a run with one held-out prompt, one with NaN on its second rank."""
    for name, changes in LAYOUTS.items():
        config = ppo_config(files, folder / name / "sound", eval_every=1, **changes)
        config = with_data(config, valid=valid)
        train(config)
        train_poisoned(dataclasses.replace(config, directory=folder / name / "poisoned"), 1)


@pytest.mark.slow
def test_fewer_prompts_than_ranks_are_answered_as_by_one(tiny: Path, tmp_path: Path):
    valid = write_lines(tmp_path / "valid.jsonl", [{"prompt": "the cheap fish"}])
    train(with_data(ppo_config(tiny, tmp_path / "one", eval_every=1), valid=valid))
    run_ranks(train_in_layouts, 2, tiny, tmp_path, valid)
    for name in LAYOUTS:
        rows = zip(rows_of(tmp_path / name / "sound"), rows_of(tmp_path / "one"), strict=True)
        for ours, theirs in rows:
            for key in NAMES:
                expected = pytest.approx(theirs[f"valid/{key}"], rel=1e-5)
                assert ours[f"valid/{key}"] == expected, (name, key)
        if name == "pp2":  # with dp2 the second rank has no prompt to answer
            assert_unanswered(tmp_path / name / "poisoned")
        assert_learned_alike(tmp_path / name / "poisoned", tmp_path / name / "sound")
