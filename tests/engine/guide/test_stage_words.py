import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from engine.guide.stage_words import ending, newest_step, next_command
from engine.plan_command import load_recipe
from engine.settings.command_line import parse_config
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig, SFTData
from tests.sources import ROOT

RECIPES = ROOT / "recipes"
SFT = SFTConfig(directory=Path("runs/a b"), data=SFTData(train=Path("d.jsonl")))
RM = RMConfig(directory=Path("runs/rm"), init_from=Path("runs/sft"))
PPO = PPOConfig(directory=Path("runs/ppo"), data=PPOData(prompts=Path("p.jsonl")))


def saved(folder: Path, step: int) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints/latest").write_text(f"step_{step:08d}\n")
    return folder


def pasted(lines: list[str]) -> list[str]:
    """The words that a shell makes of the next command."""
    return shlex.split("\n".join(lines).partition(": ")[2].replace("\\\n", ""))


def test_the_newest_step_is_that_of_latest(tmp_path):
    assert newest_step(tmp_path) is None
    assert newest_step(saved(tmp_path, 12)) == 12
    (tmp_path / "checkpoints/latest").write_text("odd")
    assert newest_step(tmp_path) is None


def test_an_end_says_where_things_are_in_lines_of_a_terminal(tmp_path):
    config = replace(SFT, directory=saved(tmp_path / "run", 12))
    lines = ending(config, None, RECIPES / "sft_tiny.py", is_alone=True)
    assert lines[0].endswith("run: finished at step 12: checkpoints/, curves.png, metrics.jsonl")
    again = ending(config, 12, RECIPES / "sft_tiny.py", is_alone=True)
    assert "finished before, at step 12; a higher --epochs goes on" in again[0]
    assert again[1:] == lines[1:]
    resumed = ending(config, 5, RECIPES / "sft_tiny.py", is_alone=True)
    assert resumed == lines
    likewise = ending(config, None, RECIPES / "sft_tiny.py", is_alone=False)
    assert likewise[1].startswith("next, started likewise: ")
    ppo = replace(PPO, directory=saved(tmp_path / "ppo", 3))
    assert "a higher --iterations" in ending(ppo, 3, RECIPES / "ppo_hf.py", is_alone=True)[0]
    short = replace(SFT, directory=Path("runs/sft_tiny"))
    shown = ending(short, None, Path("recipes/sft_tiny.py"), is_alone=True)
    assert all(len(line) <= 79 for line in shown)


@pytest.mark.parametrize(
    "config, recipe, following",
    [
        (SFT, "sft_tiny", "rm_tiny"),
        (SFT, "sft_hf", "rm_hf"),
        (SFT, "init_tiny", "rm_tiny"),
        (SFT, "init_6b", "rm_6b"),
        (SFT, "sft_6b", "ppo_6b"),
        (replace(SFT, data=SFTData()), "sft_tiny", "sft_tiny"),
        (RM, "rm_tiny", "ppo_tiny"),
        (RM, "rm_hf", "ppo_hf"),
        (RM, "rm_175b", "ppo_175b"),
    ],
)
def test_the_next_command_is_one_of_the_recipes_and_parses(config, recipe, following):
    lines = ending(config, None, RECIPES / f"{recipe}.py", is_alone=True)[1:]
    python, path, *options = pasted(lines)
    assert (python, path) == ("python", str(RECIPES / f"{following}.py"))
    parsed = parse_config(load_recipe(RECIPES, following), options)
    if isinstance(parsed, RMConfig):
        assert parsed.init_from == config.directory
    if isinstance(config, RMConfig):
        assert (parsed.policy, parsed.reward_model) == (config.init_from, config.directory)


def test_behind_ppo_come_its_answers_and_behind_ones_own_recipe_nothing():
    words = next_command(PPO, RECIPES / "ppo_tiny.py")
    assert words[0] == str(RECIPES / "generate.py")
    assert words[1:5] == ["--source", "runs/ppo", "--prompts", "p.jsonl"]
    assert next_command(SFT, Path("/elsewhere/mine.py")) == []
    assert next_command(PPO, Path("/elsewhere/mine.py")) == []
    assert len(ending(SFT, None, Path("/elsewhere/mine.py"), is_alone=True)) == 1
