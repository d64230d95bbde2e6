"""The terms of a step's loss are those of its stage."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.examples import Example
from engine.errors import UserError
from engine.evidence.case import Case
from engine.ranks.start import start_parallel
from engine.replay.kept import check_sources
from engine.replay.terms import terms_of
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from tests.tiny import SIZE


def case(stage: str, role: str) -> Case:
    return Case(stage=stage, step=0, position=0, role=role, reason="", numbers={"mean": 0.0})


def episode(*fields: str, length: int = 4, token: int = 1) -> Example:
    values = np.zeros(length, np.float32)
    tokens = np.full(length, token, np.int64)
    return Example(tokens=tokens, prompt_length=2, fields=dict.fromkeys(fields, values))


LEARNED = ("logprobs", "advantages")


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


@pytest.mark.parametrize("share_prompts", [True, False])
def test_comparisons_are_laid_out_as_the_run_had_them(share_prompts: bool):
    parallel = start_parallel(ParallelLayout(), seed=0)
    unit = [
        Example(tokens=np.arange(5), prompt_length=3, fields={"ranks": rank}) for rank in range(4)
    ]
    config = RMConfig(share_prompts=share_prompts)
    terms = terms_of(case("rm", "reward_model"), config, {"loss": [unit]}, parallel)
    (batch,) = terms["loss"].batches
    assert len(batch.tokens) == (3 + 4 * 2 if share_prompts else 4 * 5)
