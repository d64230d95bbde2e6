"""Runs that go on with what they were made from at another path."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.settings.saved import load_config
from tests.engine.identity.before_identities import forget_identity
from tests.engine.identity.test_inputs import (
    STAGES,
    cut,
    identity_of,
    more,
    refusal,
    selecting,
    small_ppo,
)
from tests.tiny import rm_config, train, write_lines

NETWORKS = {
    "sft": ("init_from", "selection.reward_model"),
    "rm": ("init_from",),
    "ppo": ("policy", "reference", "reward_model"),
}


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny recipe's files and runs, which may be changed."""
    return shutil.copytree(tiny, tmp_path / "files")


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_value(config: Any, name: str, value: Any) -> Any:
    """The config with the field of a dotted name replaced."""
    first, _, rest = name.partition(".")
    if rest:
        value = with_value(getattr(config, first), rest, value)
    return dataclasses.replace(config, **{first: value})


def made(stage: str, files: Path) -> Any:
    """A config that names all that its stage may read."""
    config = STAGES[stage][0](files, files / "run")
    return with_value(config, "reference", files / "reference") if stage == "ppo" else config


def moved(config: Any, name: str) -> Path:
    """Copy what an option names; return where the copy is."""
    path = value_of(config, name)
    if path.is_dir():
        return shutil.copytree(path, path.with_name(f"{path.name}_moved"), dirs_exist_ok=True)
    return Path(shutil.copy(path, path.with_name(f"moved_{path.name}")))


@pytest.mark.parametrize("stage", STAGES)
def test_equal_inputs_at_other_paths_are_the_runs_own_without_a_word(
    stage: str, files: Path, capsys: pytest.CaptureFixture[str]
):
    config = made(stage, files)
    train(config)
    digests = {name: file["xxh3_128"] for name, file in identity_of(files / "run")["data"].items()}
    names = (*STAGES[stage][1], *NETWORKS[stage])
    elsewhere = more(config)
    for name in names:
        elsewhere = with_value(elsewhere, name, moved(config, name))
    for name in NETWORKS[stage]:
        shutil.rmtree(value_of(config, name), ignore_errors=True)
    capsys.readouterr()
    train(elsewhere)
    said = capsys.readouterr()
    assert "keeps its own copy" not in said.out and "WARNING" not in said.err
    now = identity_of(files / "run")
    assert {name: file["xxh3_128"] for name, file in now["data"].items()} == digests
    assert now["accepted"] == []
    saved = load_config(type(config), files / "run" / "config.json")
    for name in names:
        path = value_of(elsewhere, name)
        assert value_of(saved, name) == path
        kind = "data" if name in STAGES[stage][1] else "networks"
        assert now[kind][name]["path"] == str(path)


@pytest.mark.parametrize("stage", STAGES)
def test_another_content_at_another_path_is_named_until_it_is_accepted(stage: str, files: Path):
    config = made(stage, files)
    train(config)
    names, elsewhere = list(STAGES[stage][1]), config
    for name in names:
        path = moved(config, name)
        cut(path)
        elsewhere = with_value(elsewhere, name, path)
    said = refusal(elsewhere)
    assert f"was made from something else than what is here: {names[0]} " in said
    assert said.endswith(f"--accept-changed {' '.join(names)}")
    train(dataclasses.replace(more(elsewhere), accept_changed=tuple(names)))
    saved = load_config(type(config), files / "run" / "config.json")
    assert [value_of(saved, name) for name in names] == [value_of(elsewhere, n) for n in names]
    accepted = identity_of(files / "run")["accepted"]
    assert [each["change"]["name"] for each in accepted] == names


def test_another_network_at_another_path_is_named_until_it_is_accepted(files: Path):
    config = small_ppo(files, files / "run", reference=files / "reference")
    train(config)
    before = identity_of(files / "run")["networks"]
    for name, other in (("policy", "reference"), ("reference", "policy")):
        said = refusal(with_value(config, name, files / other))
        assert f"something else than what is here: {name} {before[name]['xxh3_128'][:8]}" in said
        assert said.endswith(f"--accept-changed {name}")
    for name in ("policy", "reward_model", "reference"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*/gone: no such"):
            train(with_value(config, name, files / "gone"))
    elsewhere = with_value(config, "reference", files / "policy")
    train(dataclasses.replace(more(elsewhere), accept_changed=("reference",)))
    now = identity_of(files / "run")
    assert now["networks"]["reference"]["xxh3_128"] == before["policy"]["xxh3_128"]
    train(more(elsewhere))  # it is the run's own now
    said = refusal(more(config))
    assert said.endswith("--accept-changed reference")


def test_a_path_where_there_was_none_or_none_where_there_was_one_is_named(files: Path):
    paths = {
        "sft": ("data.valid", "data.pretraining_valid", "init_from", "selection.reward_model"),
        "rm": ("data.demonstrations",),
        "ppo": ("reference",),
    }
    for stage, names in paths.items():
        config = dataclasses.replace(made(stage, files), directory=files / f"run_{stage}")
        train(config)
        for name in names:
            with pytest.raises(UserError, match=f"is a run with {name} {value_of(config, name)}, "):
                train(with_value(config, name, None))
    config = rm_config(files, files / "run")
    train(config)
    valid = moved(config, "data.train")
    accepting = dataclasses.replace(config, accept_changed=("data.valid",))
    for started in (config, accepting):
        with pytest.raises(UserError, match=f"is a run with data.valid None, not {valid}"):
            train(with_value(started, "data.valid", valid))


def test_a_path_that_is_read_neither_then_nor_now_is_no_setting(files: Path):
    config = dataclasses.replace(small_ppo(files, files / "run"), ptx_coef=0.0)
    train(config)
    train(with_value(more(config), "data.pretraining", files / "nowhere.jsonl"))


def test_paths_are_settings_where_nobody_knows_what_they_held(files: Path):
    config = rm_config(files, files / "run")
    train(config)
    elsewhere = {name: moved(config, name) for name in ("data.train", "init_from")}
    identity = files / "run" / "identity.json"
    hidden = identity.rename(files / "hidden")  # checkpoints know the contents, and no paths
    said = f"is a run with init_from .*, not {elsewhere['init_from']}"
    with pytest.raises(UserError, match=said):
        train(with_value(config, "init_from", elsewhere["init_from"]))
    hidden.rename(identity)
    forget_identity(files / "run")
    for name, path in elsewhere.items():
        with pytest.raises(UserError, match=f"is a run with {name} .*, not {path}"):
            train(with_value(config, name, path))


def test_another_policy_is_named_where_one_copy_is_policy_and_reference(files: Path):
    config = small_ppo(files, files / "run", reference=files / "policy")
    train(config)
    for name in ("policy", "reference"):
        said = refusal(with_value(config, name, files / "reference"))
        assert said.endswith(f"--accept-changed {name}")
    train(with_value(more(config), "policy", moved(config, "policy")))
    sources = sorted(path.name for path in (files / "run" / "sources").iterdir())
    assert sources == ["reference", "reward_model"]


def test_a_setting_that_changed_is_said_before_what_moved(files: Path):
    config = selecting(files, files / "run")
    train(config)
    write_lines(files / "other.jsonl", [{"prompt": "a", "response": "b"}] * 9)
    other = with_value(config, "data.train", files / "other.jsonl")
    said = refusal(dataclasses.replace(other, seed=99))
    assert f"is a run with seed {config.seed}, not 99" in said
