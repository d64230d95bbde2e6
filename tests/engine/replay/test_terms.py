"""What was kept of a step is held to what its network can learn from."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.examples import Example
from engine.errors import UserError
from engine.evidence.case import Case
from engine.ranks.start import start_parallel
from engine.replay.terms import check_sources, config_in, terms_of
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import save_config
from tests.tiny import SIZE


def case(stage: str, role: str) -> Case:
    return Case(stage=stage, step=0, position=0, role=role, reason="", numbers={"mean": 0.0})


def episode(*fields: str, length: int = 4, token: int = 1) -> Example:
    values = np.zeros(length, np.float32)
    tokens = np.full(length, token, np.int64)
    return Example(tokens=tokens, prompt_length=2, fields=dict.fromkeys(fields, values))


LEARNED = ("logprobs", "advantages")
REFUSED = [
    ("sft", "critic", {"loss": [episode()]}, "no batch of the critic in sft"),
    ("sft", "policy", {}, "no batch of the policy"),
    ("sft", "policy", {"episodes": [episode()]}, "no batch of the policy"),
    ("ppo", "policy", {"ptx": [episode()]}, "without episodes"),
    ("ppo", "policy", {"episodes": [episode("logprobs")]}, "without advantages, logprobs"),
    ("rm", "reward_model", {"loss": [[episode()]]}, "without ranks"),
    ("sft", "policy", {"loss": [episode(token=SIZE.vocab_size)]}, "beyond the vocabulary of 100"),
    ("sft", "policy", {"loss": [episode(length=65)]}, "beyond the context of 64"),
]


@pytest.mark.parametrize(("stage", "role", "sources", "words"), REFUSED)
def test_batch_of_another_kind_is_refused(stage: str, role: str, sources: dict, words: str):
    with pytest.raises(UserError, match=f"batch.safetensors: .*{words}"):
        check_sources(Path("kept"), case(stage, role), sources, SIZE)


def test_terms_are_those_of_the_stage():
    parallel = start_parallel(ParallelLayout(), seed=0)
    sources = {"episodes": [episode(*LEARNED)], "ptx": [episode()]}
    check_sources(Path("kept"), case("ppo", "policy"), sources, SIZE)
    with pytest.raises(UserError, match="whitening without its 'rstd'"):
        terms_of(case("ppo", "policy"), PPOConfig(), sources, parallel)
    whole = Case(stage="ppo", step=0, position=0, role="policy", reason="")
    terms = terms_of(whole, PPOConfig(), sources, parallel)
    assert {name: term.scale for name, term in terms.items()} == {
        "policy_loss": 1.0,
        "ptx_loss": 27.8,
    }
    del sources["ptx"]
    assert list(terms_of(whole, PPOConfig(), sources, parallel)) == ["policy_loss"]


def test_settings_are_those_of_the_stage(tmp_path: Path):
    save_config(RMConfig(seed=7), tmp_path / "config.json")
    found = config_in(tmp_path, case("rm", "reward_model"))
    assert isinstance(found, RMConfig) and found.seed == 7
    with pytest.raises(UserError, match=r"config\.json"):
        config_in(tmp_path, case("ppo", "policy"))
