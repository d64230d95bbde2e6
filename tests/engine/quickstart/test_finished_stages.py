import dataclasses
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.quickstart.finished_stages import FinishedStages
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.sampling import SamplingConfig
from tests.tiny import SIZE, weights_of

PPO = PPOConfig(
    sampling=SamplingConfig(max_new_tokens=12, num_slots=4, cache_gib=0.01),
    micro_batch_tokens=128,
)
PROMPTS = ["the mill", "a cheap pub", "fish"]


@pytest.fixture
def finished(tiny: Path, tmp_path: Path) -> FinishedStages:
    """The stages of a folder that has a policy as sft and a reward model as rm."""
    for stage, role in (("sft", "policy"), ("ppo", "reference"), ("rm", "reward_model")):
        (tmp_path / stage).symlink_to(tiny / role)
    parallel = start_parallel(ParallelLayout(), seed=0)
    return FinishedStages(tmp_path, parallel, Numerics(), PPO, seed=3)


@pytest.mark.parametrize(
    ("stage", "kind", "role"),
    [
        ("sft", "language", "policy"),
        ("ppo", "language", "policy"),
        ("rm", "scalar", "reward_model"),
    ],
)
def test_a_stages_network_is_the_one_that_it_ended_with(stage, kind, role, finished):
    network = finished.load(stage, kind)
    wanted = weights_of(finished.home / stage, role)
    found = dict(network.modules[0].named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_prompts_that_leave_no_room_for_a_whole_answer_are_left_out(finished: FinishedStages):
    room = SIZE.context_length - PPO.sampling.max_new_tokens
    num_tokens = {n: len(finished.tokenizer.encode("fish" * n + "\n")) for n in range(1, 80)}
    fits = max(n for n, count in num_tokens.items() if count <= room)
    assert num_tokens[fits] == room
    prompts = finished.prompts(["fish" * fits, "fish" * (fits + 1), "the mill"])
    assert finished.fitting(prompts) == [prompts[0], prompts[2]]
    with pytest.raises(UserError, match=f"all 1 .* are too long, 1 with a prompt over {room}"):
        finished.fitting(prompts[1:2])


def test_an_answer_is_a_rollouts_response_as_text(finished: FinishedStages):
    heard: list[None] = []
    policy = finished.load("sft", "language")
    prompts = finished.prompts(PROMPTS)
    rollout, texts = finished.answer(policy, prompts, lambda: heard.append(None))
    assert len(texts) == len(heard) == len(PROMPTS)
    for example, prompt, text in zip(rollout.examples, PROMPTS, texts, strict=True):
        tokens, length = example.tokens.tolist(), example.prompt_length
        assert finished.tokenizer.decode(tokens[:length]) == f"{prompt}\n"
        assert finished.tokenizer.decode(tokens[length:]) == text
    again = finished.answer(policy, prompts)[1]
    assert again == texts
    finished.seed += 1
    assert finished.answer(policy, prompts)[1] != texts


def test_what_a_network_makes_of_answers_does_not_hang_on_the_budget(finished: FinishedStages):
    prompts = finished.prompts(PROMPTS)
    rollout, _ = finished.answer(finished.load("sft", "language"), prompts)
    reward_model = finished.load("rm", "scalar")
    readings = finished.read(reward_model, rollout)
    assert readings.shape == rollout.response_mask.shape
    finished.ppo = dataclasses.replace(PPO, micro_batch_tokens=4096)
    assert torch.allclose(finished.read(reward_model, rollout), readings, atol=1e-5)
