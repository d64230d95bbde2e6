from pathlib import Path

import pytest

from engine.errors import UserError
from engine.plan_command import load_recipe, plan_command
from engine.planning.hardware import named_cluster
from engine.planning.plan import plan
from engine.settings.sft import SFTConfig

RECIPE = """
from engine.settings.sft import SFTConfig

config = SFTConfig(size="1.3b", batch_size=24)
"""
CONFIG = SFTConfig(size="1.3b", batch_size=24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one recipe, sft_own, and of files that are none."""
    (tmp_path / "sft_own.py").write_text(RECIPE)
    (tmp_path / "rm_empty.py").write_text("config = None\n")
    (tmp_path / "plan.py").write_text("")
    return tmp_path


def test_a_recipe_is_given_by_its_name_or_by_its_path(folder: Path, tmp_path_factory):
    assert load_recipe(folder, "sft_own") == CONFIG
    elsewhere = tmp_path_factory.mktemp("no_recipes")
    assert load_recipe(elsewhere, str(folder / "sft_own.py")) == CONFIG


def test_an_unknown_recipe_is_an_error_that_lists_those_of_a_stage(folder: Path):
    names = "give a path, or one of rm_empty, sft_own$"
    with pytest.raises(UserError, match=f"no recipe 'sft_other': {names}"):
        load_recipe(folder, "sft_other")
    with pytest.raises(UserError, match=f"no recipe '.*sft_other.py': {names}"):
        load_recipe(folder, str(folder / "sft_other.py"))
    for name in ("a" * 10_000, "a\0", "\ud800.py"):
        with pytest.raises(UserError, match="no recipe 'a|no recipe '.ud800") as error:
            load_recipe(folder, name)
        assert len(str(error.value)) < 1000


def test_a_file_without_a_stages_config_is_an_error(folder: Path):
    with pytest.raises(UserError, match="rm_empty.py has no `config` of a stage"):
        load_recipe(folder, "rm_empty")


def test_options_of_the_plan_and_of_the_recipe_stand_side_by_side(folder: Path, capsys):
    plan_command(folder, ["sft_own", "--gpus", "16", "--gpu", "a100", "--epochs", "4"])
    lines = capsys.readouterr().out.splitlines()
    wanted = SFTConfig(size="1.3b", batch_size=24, epochs=4.0)
    assert lines == plan(wanted, named_cluster("a100", 16)).lines()
    assert lines != plan(CONFIG, named_cluster("a100", 16)).lines()


def test_help_says_which_recipes_there_are(folder: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        plan_command(folder, ["--help"])
    assert not stop.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert "plan.py RECIPE [options], RECIPE being one of rm_empty, sft_own." in shown
    assert "--batch-size" not in shown
    with pytest.raises(SystemExit):
        plan_command(folder, ["sft_own", "--help"])
    assert "--batch-size" in capsys.readouterr().out


def test_a_mistake_in_the_name_ends_the_command_with_one_line(folder: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        plan_command(folder, ["sft_other", "--gpus", "16"])
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.err == "error: no recipe 'sft_other': give a path, or one of rm_empty, sft_own\n"
    assert told.out == ""
