import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.identity.kept_origins import refuse_gone_origins
from engine.recipe import run_stage
from engine.settings.ppo import PPOConfig
from engine.settings.saved import save_config
from engine.settings.sft import SelectionConfig, SFTConfig


def kept(run: Path, *names: str) -> Path:
    for name in names:
        (run / "sources" / name).mkdir(parents=True)
    return run


def refusal(config: Any, saved: Any, run: Path) -> str:
    with pytest.raises(UserError) as caught:
        refuse_gone_origins(config, saved, run)
    return str(caught.value)


def test_the_copy_of_an_earlier_run_is_named_as_the_option_to_give(tmp_path):
    run, gone = kept(tmp_path / "run", "init_from", "selection_reward_model"), tmp_path / "gone"
    saved = SFTConfig(directory=run, init_from=gone)
    config = dataclasses.replace(saved, directory=tmp_path / "new")
    said = f"--init-from {gone}: no such file or folder; {run} has kept what was there: "
    assert refusal(config, saved, run) == f"{said}give --init-from {run / 'sources' / 'init_from'}"
    gone.symlink_to("blobs")
    assert "is a link to nothing (blobs is gone)" in refusal(config, saved, run)
    selection = SelectionConfig(reward_model=tmp_path / "rm")
    saved = SFTConfig(directory=run, selection=selection)
    config = dataclasses.replace(saved, directory=tmp_path / "new")
    wanted = f"give --selection.reward-model {run / 'sources' / 'selection_reward_model'}"
    assert refusal(config, saved, run).endswith(wanted)


def test_the_policy_of_ppo_may_be_kept_as_the_reference(tmp_path):
    run = kept(tmp_path / "run", "reference", "reward_model")
    saved = PPOConfig(directory=run, policy=tmp_path / "gone", reward_model=tmp_path)
    config = dataclasses.replace(saved, directory=tmp_path / "new")
    assert f"give --policy {run / 'sources' / 'reference'}" in refusal(config, saved, run)


def test_nothing_is_said_where_it_is_there_or_another_or_the_run_goes_on(tmp_path):
    run, gone = kept(tmp_path / "run", "init_from"), tmp_path / "gone"
    saved = SFTConfig(directory=run, init_from=gone)
    refuse_gone_origins(saved, saved, run)
    new = dataclasses.replace(saved, directory=tmp_path / "new")
    refuse_gone_origins(dataclasses.replace(new, init_from=tmp_path / "another"), saved, run)
    refuse_gone_origins(new, dataclasses.replace(saved, init_from=None), run)
    refuse_gone_origins(new, saved, tmp_path / "elsewhere")
    refuse_gone_origins(object(), object(), run)
    gone.mkdir()
    refuse_gone_origins(new, saved, run)


def test_a_recipe_says_it_before_it_starts(tmp_path, capsys):
    run = kept(tmp_path / "run", "init_from")
    save_config(SFTConfig(directory=run, init_from=tmp_path / "gone"), run / "config.json")
    with pytest.raises(SystemExit) as ended:
        arguments = ["--config", str(run), "--directory", str(tmp_path / "new")]
        run_stage(lambda config: None, SFTConfig(), arguments)
    assert ended.value.code == 2
    assert f"give --init-from {run / 'sources' / 'init_from'}" in capsys.readouterr().err
