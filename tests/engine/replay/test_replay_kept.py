"""What was kept of a case is held to what its networks can read and learn from."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.examples import Example
from engine.errors import UserError
from engine.evidence.case import Case
from engine.ranks.start import start_parallel
from engine.replay.kept import check_sources, config_in, network_in
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import save_config
from tests.tiny import SIZE


def case(stage: str, role: str) -> Case:
    return Case(stage=stage, step=0, position=0, role=role, reason="")


def episode(*fields: str, length: int = 4, token: int = 1) -> Example:
    values = np.zeros(length, np.float32)
    tokens = np.full(length, token, np.int64)
    return Example(tokens=tokens, prompt_length=2, fields=dict.fromkeys(fields, values))


REFUSED = [
    ("sft", "critic", {"loss": [episode()]}, "no batch of the critic in sft"),
    ("sft", "policy", {}, "no batch of the policy"),
    ("sft", "policy", {"episodes": [episode()]}, "no batch of the policy"),
    ("ppo", "policy", {"ptx": [episode()]}, "without episodes"),
    ("ppo", "policy", {"episodes": [episode("logprobs")]}, "without advantages, logprobs"),
    ("rm", "reward_model", {"loss": [[episode()]]}, "without ranks"),
    ("rm", "reward_model", {"loss": [[episode("ranks"), episode("ranks", token=2)]]}, "one prompt"),
    ("rm", "reward_model", {"loss": [[episode("ranks", length=2)]]}, "one prompt"),
    ("sft", "rollout", {"episodes": [episode()]}, "no batch of the rollout in sft"),
    ("ppo", "rollout", {"episodes": [episode("has_eos")]}, "without has_eos, sampled_logprobs"),
    ("sft", "policy", {"loss": [episode(token=SIZE.vocab_size)]}, "beyond the vocabulary of 100"),
    ("sft", "policy", {"loss": [episode(length=65)]}, "beyond the context of 64"),
]


@pytest.mark.parametrize(("stage", "role", "sources", "words"), REFUSED)
def test_batch_of_another_kind_is_refused(stage: str, role: str, sources: dict, words: str):
    with pytest.raises(UserError, match=f"batch.safetensors: .*{words}"):
        check_sources(Path("kept"), case(stage, role), sources, SIZE)


def test_settings_are_those_of_the_stage(tmp_path: Path):
    save_config(RMConfig(seed=7), tmp_path / "config.json")
    found = config_in(tmp_path, case("rm", "reward_model"))
    assert isinstance(found, RMConfig) and found.seed == 7 and found.share_prompts
    with pytest.raises(UserError, match=r"config\.json"):
        config_in(tmp_path, case("ppo", "policy"))
    (tmp_path / "config.json").write_text("{}")  # of before prompts were shared
    assert config_in(tmp_path, case("rm", "reward_model")) == RMConfig(share_prompts=False)


def test_a_network_is_its_folders_and_no_other_is_taken(tiny: Path):
    parallel = start_parallel(ParallelLayout(), seed=0)
    newest = tiny / "policy" / "checkpoints" / "step_00000000"
    network = network_in(newest / "policy", PPOConfig(), parallel)
    assert network.kind == "language" and network.size == SIZE
    with pytest.raises(UserError, match="no checkpoint of a critic here"):
        network_in(newest / "critic", PPOConfig(), parallel)
