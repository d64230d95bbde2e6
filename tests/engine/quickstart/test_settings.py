"""The recipe's own config: what a stage of it needs of the others."""

import dataclasses
from pathlib import Path

import pytest

from engine.data.prompt_format import OPTIONS
from engine.errors import UserError
from engine.quickstart.settings import QuickstartConfig
from engine.settings.command_line import parse_config
from engine.settings.layout import ParallelLayout
from engine.settings.saved import load_config, save_config
from recipes.quickstart import config as recipe


def test_options_reach_the_stages_and_what_they_share():
    options = ["--data", "folder", "--ppo.kl.coef", "0.3", "--rm.epochs", "2", "--layout.tp", "2"]
    found = parse_config(recipe, options)
    assert (found.data, found.layout) == (Path("folder"), ParallelLayout(tp=2))
    assert found.ppo == dataclasses.replace(
        recipe.ppo, kl=dataclasses.replace(recipe.ppo.kl, coef=0.3)
    )
    assert found.rm == dataclasses.replace(recipe.rm, epochs=2.0)
    assert (found.sft, found.pretrain) == (recipe.sft, recipe.pretrain)


def test_a_saved_quickstart_reads_back_equal(tmp_path: Path):
    save_config(recipe, tmp_path / "config.json")
    assert load_config(QuickstartConfig, tmp_path / "config.json") == recipe


def test_prompts_are_read_by_each_stage_as_by_the_one_before():
    """What SFT has learned to answer is what is compared and sampled."""
    stages = (recipe.pretrain, recipe.sft, recipe.rm, recipe.ppo)
    assert {getattr(stage.data, name) for stage in stages for name in OPTIONS} == {None}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--faults-per-level", "nan"], "--faults-per-level must be at least 0, got nan"),
        (["--task", "/etc/x"], "task '/etc/x' must be the beginning of file names"),
        (["--task", "**"], r"task '\*\*' must be the beginning of file names"),
    ],
)
def test_an_option_that_means_nothing_is_an_error(options: list[str], cause: str):
    with pytest.raises(UserError, match=cause):
        parse_config(QuickstartConfig(), options)
