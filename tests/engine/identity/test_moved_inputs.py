"""Runs that go on with what they were made from at another path."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.identity.made_from import UNCHANGING
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


OPTIONAL = {
    "sft": ("data.valid", "data.pretraining_valid", "selection.prompts"),
    "rm": ("data.demonstrations",),
    "ppo": ("data.pretraining_valid",),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_where_there_was_none_and_none_where_there_was_one_is_accepted(
    stage: str, files: Path
):
    config, names = made(stage, files), OPTIONAL[stage]
    train(config)
    without = config
    for name in names:
        without = with_value(without, name, None)
    saying = f"--accept-changed {' '.join(names)}"
    said = refusal(without)
    assert all(f"{name} " in said for name in names) and said.count(" -> none") == len(names)
    assert said.endswith(saying)
    train(dataclasses.replace(more(without), accept_changed=names))
    train(more(without))
    said = refusal(more(config))
    assert said.count(" none -> ") == len(names) and said.endswith(saying)
    train(dataclasses.replace(more(config), accept_changed=names))
    train(more(config))
    accepted = identity_of(files / "run")["accepted"]
    assert [each["change"]["name"] for each in accepted] == [*names, *names]
    assert [each["change"]["new"] == "none" for each in accepted] == (
        [True] * len(names) + [False] * len(names)
    )


def test_held_out_comparisons_of_their_own_may_come_later(files: Path):
    config = rm_config(files, files / "run")
    train(config)
    other = with_value(config, "data.valid", moved(config, "data.train"))
    assert refusal(other).endswith("--accept-changed data.valid")
    train(dataclasses.replace(more(other), accept_changed=("data.valid",)))
    assert identity_of(files / "run")["accepted"][0]["change"]["old"] == "none"


def test_content_alone_says_whether_a_reference_is_another(files: Path):
    config = small_ppo(files, files / "run")
    train(config)
    train(with_value(config, "reference", moved(config, "policy")))  # the policy's own start
    train(config)
    other = with_value(config, "reference", files / "reference")
    assert refusal(other).endswith("--accept-changed reference")
    train(dataclasses.replace(other, accept_changed=("reference",)))
    assert refusal(config).endswith("--accept-changed reference")
    train(dataclasses.replace(config, accept_changed=("reference",)))
    names = [each["change"]["name"] for each in identity_of(files / "run")["accepted"]]
    assert names == ["reference", "reference"]


@pytest.mark.parametrize("name", UNCHANGING)
def test_what_a_run_has_to_its_end_or_never_is_not_accepted_and_why(name: str, files: Path):
    config = made("sft", files)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid=None))
    selection = dataclasses.replace(config.selection, prompts=files / "prompts.jsonl")
    config = dataclasses.replace(config, selection=selection, tokenizer=files / "tokenizer.json")
    train(config)
    accepting = dataclasses.replace(config, accept_changed=(name,))
    said = refusal(with_value(accepting, name, None))
    path = value_of(config, name)
    assert said.startswith(f"{files / 'run'} is a run with {name} {path}, not None ")
    assert f"(--accept-changed lets none of it pass: {name}: {UNCHANGING[name]})" in said
    assert said.endswith(f"--{name.replace('_', '-')} {path}")


def test_a_path_that_is_read_neither_then_nor_now_is_no_setting(files: Path):
    config = dataclasses.replace(small_ppo(files, files / "run"), ptx_coef=0.0)
    train(config)
    train(with_value(more(config), "data.pretraining", files / "nowhere.jsonl"))


def test_paths_are_settings_where_nobody_knows_what_they_held(files: Path):
    config = rm_config(files, files / "run")
    train(config)
    forget_identity(files / "run")
    for name in ("data.train", "init_from"):
        path = moved(config, name)
        with pytest.raises(UserError, match=f"is a run with {name} .*, not {path}"):
            train(with_value(config, name, path))
    other = with_value(config, "data.valid", moved(config, "data.train"))
    with pytest.raises(UserError, match="lets none of it pass: data.valid: nobody knows what it"):
        train(dataclasses.replace(other, accept_changed=("data.valid",)))


@pytest.mark.parametrize("stage", STAGES)
def test_content_decides_where_a_checkpoint_alone_knows_it(stage: str, files: Path):
    config, elsewhere = made(stage, files), made(stage, files)
    train(config)
    (files / "run" / "identity.json").unlink()  # checkpoints know the contents, and no paths
    for name in NETWORKS[stage]:
        elsewhere = with_value(elsewhere, name, moved(config, name))
    train(elsewhere)
    assert identity_of(files / "run")["accepted"] == []
    (files / "run" / "identity.json").unlink()
    name = NETWORKS[stage][0]
    other = files / ("policy" if name == "reward_model" else "reference")
    with pytest.raises(UserError, match="made from something else") as refused:
        train(with_value(elsewhere, name, other))
    assert str(refused.value).endswith(f"--accept-changed {name}")


def test_another_policy_is_named_where_one_copy_is_policy_and_reference(files: Path):
    config = small_ppo(files, files / "run", reference=files / "policy")
    train(config)
    for name in ("policy", "reference"):
        said = refusal(with_value(config, name, files / "reference"))
        assert said.endswith(f"--accept-changed {name}")
    train(with_value(more(config), "policy", moved(config, "policy")))
    sources = sorted(path.name for path in (files / "run" / "sources").iterdir())
    assert sources == ["reference", "reward_model"]


def test_settings_and_what_moved_are_one_error(files: Path):
    config = selecting(files, files / "run")
    train(config)
    write_lines(files / "other.jsonl", [{"prompt": "a", "response": "b"}] * 9)
    other = with_value(config, "data.train", files / "other.jsonl")
    said = refusal(dataclasses.replace(other, seed=99))
    assert f"is a run with seed {config.seed}, not 99" in said
    assert "was made from something else than what is here: data.train 40 records" in said
    assert said.endswith(f"--seed {config.seed} --accept-changed data.train")
