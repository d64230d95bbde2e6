import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoints.found import size_of
from engine.errors import UserError
from engine.ppo import train as train_ppo
from engine.rollout import Rollout, generate_rollout
from engine.score import Scored, read_rollout, score_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network
from engine.update import (
    Learner,
    update,
)
from tests.tiny import (
    SIZE,
    WORDS,
    ppo_config,
    rows_of,
    train,
    write_checkpoints,
)


def test_critic_starts_as_the_reward_model(tiny: Path, tmp_path: Path, monkeypatch):
    seen = {}

    def look(rollout: Rollout, config: PPOConfig, **roles: Network) -> Scored:
        for role in ("critic", "reward_model", "policy", "reference"):
            seen[role] = read_rollout(roles[role], rollout, 1000)
        return score_rollout(rollout, config, **roles)

    monkeypatch.setattr("engine.ppo.score_rollout", look)
    config = ppo_config(tiny, tmp_path, iterations=1, reference=None)
    train(config)
    assert torch.equal(seen["critic"], seen["reward_model"])
    assert seen["critic"].std() > 0.1
    assert torch.equal(seen["policy"], seen["reference"])
    # Of a response by the sampler's log-probs; by the trainer's it is 0 to the last bit.
    assert rows_of(tmp_path)[0]["score/kl"] == pytest.approx(0.0, abs=1e-4)
    run = tmp_path / "scored"
    train(dataclasses.replace(config, directory=run, policy_logprobs="scored"))
    assert rows_of(run)[0]["score/kl"] == 0.0


def test_critic_may_be_of_another_size_than_the_policy(tiny: Path, tmp_path: Path):
    small = dataclasses.replace(SIZE, num_layers=2, hidden_size=16)
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    write_checkpoints(tmp_path, small)
    run = tmp_path / "run"
    train(ppo_config(tiny, run, iterations=1, reward_model=tmp_path / "reward_model"))
    assert (size_of(run, "policy"), size_of(run, "critic")) == (SIZE, small)


def test_draws_of_an_iteration_are_no_other_iterations(tiny: Path, tmp_path: Path, monkeypatch):
    first = []

    def note(*arguments: object, first_sample_index: int, **named: object) -> Rollout:
        first.append(first_sample_index)
        return generate_rollout(*arguments, first_sample_index=first_sample_index, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.ppo.generate_rollout", note)
    config = ppo_config(tiny, tmp_path, iterations=3)
    train(config)
    assert first == [0, config.rollout_batch_size, 2 * config.rollout_batch_size]


def test_generation_layout_that_cannot_be_filled_is_refused_before_loading(
    tiny: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("engine.identity.inputs.load_weights", pytest.fail)
    config = ppo_config(tiny, tmp_path, generation_layout=ParallelLayout(pp=2))
    with pytest.raises(UserError, match="^generation_layout: "):
        train(config)


def test_dropout_is_off_everywhere(tiny: Path, tmp_path: Path, monkeypatch):
    seen = []

    def look(learner: Learner, *arguments: object, **named: object) -> dict[str, float]:
        seen.extend([learner.policy.network.config, learner.critic.network.config])
        return update(learner, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.update.update", look)
    train(ppo_config(tiny, tmp_path, iterations=1))
    assert seen
    assert {(config.hidden_dropout, config.attention_dropout) for config in seen} == {(0.0, 0.0)}
    assert rows_of(tmp_path)[0]["update/first_ratio_error"] < 1e-5


def test_run_records_every_phase(tiny: Path, tmp_path: Path):
    train(ppo_config(tiny, tmp_path, num_shown=3))
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    for phase in ("rollout", "score", "advantage", "update"):
        assert f'"{phase}/seconds"' in text
    (row, _) = rows_of(tmp_path)
    assert row["advantage/pad_leak"] == 0.0
    assert row["score/logprob_mismatch_max"] < 1e-5
    assert row["kl/coef"] == 0.02
    assert row["rollout/response_tokens"] <= 24
    samples = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 6  # three of the first iteration and of the last
    assert any(word in samples[0] for word in WORDS)
    alarms = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    # Six prompts are held out, a third as many as there are episodes; and of four updates.
    assert [alarm["name"] for alarm in alarms] == ["few_held_out", "evaluation", "average"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"minibatch_size": 3}, "--rollout-batch-size 8 must be a multiple of --minibatch-size 3"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "sampling.temperature must be positive"),
        ({"sampling": SamplingConfig(max_new_tokens=64)}, "max-new-tokens 64 leaves no room"),
        ({"reward_model": Path("nowhere")}, "--reward-model nowhere: no such file or folder"),
        ({"size": "7b"}, "no size is named '7b'"),
        ({"size": "6b"}, "the policy has 4 layers of width 32 .* a 6b has 32 of 4096"),
        ({"reward_model_size": "6b"}, "the reward_model has 4 layers of width 32"),
        ({"critic_layout": ParallelLayout(tp=3)}, "critic_layout: tp 3 must divide"),
        ({"critic_layout": ParallelLayout(pp=2)}, "critic_layout: 1 ranks cannot be split"),
        ({"generation_layout": ParallelLayout(tp=3)}, "generation_layout: tp 3 must divide"),
        (
            {"generation_layout": ParallelLayout(tp=2)},
            "generation_layout: 1 ranks cannot",
        ),
        ({"generation_layout": ParallelLayout(pp=2)}, "generation_layout: .* without pipeline"),
        (
            {"generation_layout": ParallelLayout(cp=2)},
            "generation_layout: .* context paral",
        ),
        ({"generation_layout": ParallelLayout()}, "generation_layout: .* would gain nothing"),
    ],
)
def test_impossible_config_is_an_error(changes: dict, cause: str, tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match=cause):
        train_ppo(ppo_config(tiny, tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/checkpoints/*"))
