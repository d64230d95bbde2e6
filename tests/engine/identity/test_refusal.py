"""All that keeps a run from going on is one error, whose last line lets it go on."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.identity import inputs
from engine.identity.record import Change
from engine.identity.refusal import refusal
from engine.ranks.start import start_parallel
from engine.recipe import run_stage
from engine.run import start_run
from engine.settings.layout import ParallelLayout
from engine.settings.rm import RMConfig
from tests.engine.identity.test_inputs import identity_of, reverse, small_ppo
from tests.engine.identity.test_inputs import refusal as refusal_of
from tests.tiny import rm_config, train


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny recipe's files and runs, which may be changed."""
    return shutil.copytree(tiny, tmp_path / "files")


def options_in(said: str) -> list[str]:
    """The options of a refusal's last line, as a shell reads them."""
    line = "--" + said.splitlines()[-1].partition(" by --")[2]
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]


def go_on_by(said: str, config: Any) -> None:
    run_stage(train, config, options_in(said))  # type: ignore[arg-type]


def test_run_of_before_held_out_prompts_goes_on_by_what_one_start_says(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    config, run = small_ppo(files, files / "run"), files / "run"
    first = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_fraction=0.0))
    train(first)
    settings = json.loads((run / "config.json").read_text())
    for name in ("valid", "valid_fraction", "num_valid"):
        del settings["data"][name]
    (run / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(inputs, "code_digest", lambda: "0123456789")
    said = refusal_of(config)
    assert "is a run with data.valid_fraction 0.0, not " in said
    assert options_in(said) == ["--data.valid-fraction", "0.0", "--accept-changed", "code"]
    go_on_by(said, dataclasses.replace(config, iterations=2))
    assert [each["change"]["name"] for each in identity_of(run)["accepted"]] == ["code"]


def test_all_settings_and_all_else_are_one_error(files: Path, monkeypatch: pytest.MonkeyPatch):
    config = rm_config(files, files / "run")
    train(config)
    reverse(files / "comparisons.jsonl")
    monkeypatch.setattr(inputs, "code_digest", lambda: "0123456789")
    data = dataclasses.replace(config.data, prompt_suffix="it's\n", demonstrations=None)
    adam = dataclasses.replace(config.adam, lr=0.5)
    other = dataclasses.replace(
        config, seed=99, data=data, adam=adam, accept_changed=("code",), batch_size=3
    )
    said = refusal_of(other)
    for words in ("seed ", "data.prompt_suffix '\\n', not \"it's\\n\";", "adam.lr ", "batch_size "):
        assert words in said.partition("was made from something else")[0]
    assert " data.train 24 records" in said and " data.demonstrations 40 records" in said
    assert "; code " not in said
    assert said.endswith("--accept-changed data.train data.demonstrations code")
    go_on_by(said, other)
    names = [each["change"]["name"] for each in identity_of(files / "run")["accepted"]]
    assert names == ["data.train", "data.demonstrations", "code"]


def test_a_setting_that_other_files_follow_from_is_said_alone(files: Path):
    config = small_ppo(files, files / "run")
    train(config)
    said = refusal_of(dataclasses.replace(config, ptx_coef=0.0))
    assert options_in(said) == ["--ptx-coef", str(config.ptx_coef)]


def test_what_is_not_there_is_said_beside_the_settings(files: Path):
    config = rm_config(files, files / "run")
    train(config)
    (files / "demonstrations.jsonl").unlink()
    said = refusal_of(dataclasses.replace(config, seed=99))
    assert f"is a run with seed {config.seed}, not 99" in said
    assert f"{files / 'demonstrations.jsonl'}: " in said


def test_saved_value_that_is_none_is_said_beside_the_settings(files: Path):
    config, path = rm_config(files, files / "run"), files / "run" / "config.json"
    train(config)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": "many"}))
    said = refusal_of(config)
    assert "is a run with seed many, not " in said and "seed cannot be 'many'" in said


def test_nothing_is_said_where_nothing_keeps_a_run(tiny: Path, tmp_path: Path):
    parallel = start_parallel(ParallelLayout(), 7)
    run = start_run(directory=tmp_path, parallel=parallel, tokenizer=tiny / "policy")
    found = [Change(name="torch", old="1", new="2"), Change(name="code", old="3", new="4")]
    accepting = RMConfig(accept_changed=("code", "torch"))
    assert refusal(run, accepting, {}, found) == refusal(run, accepting, {}, []) == ""
    partly = refusal(run, RMConfig(accept_changed=("code",)), {}, found, odds="at odds")
    assert partly.splitlines() == [
        f"{tmp_path} was made from something else than what is here: torch 1 -> 2",
        "at odds",
        "put that back, give another --directory, or go on with this by "
        "--accept-changed torch code",
    ]
