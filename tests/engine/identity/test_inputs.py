"""Runs of the three stages that are started again when something else is there than before."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.retention import step_name
from engine.errors import UserError
from engine.identity import inputs
from engine.recipe import run_stage
from engine.settings.layout import ParallelLayout
from engine.settings.saved import load_config
from engine.settings.saving import SaveConfig
from engine.settings.sft import SelectionConfig, SFTConfig
from tests.engine.identity.before_identities import forget_identity
from tests.ranks import run_ranks
from tests.tiny import (
    ppo_config,
    rm_config,
    rows_of,
    sft_config,
    train,
    write_lines,
    write_tokenizer,
)


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny recipe's files and runs, which may be changed."""
    return shutil.copytree(tiny, tmp_path / "files")


def selecting(files: Path, directory: Path, **changes: Any) -> SFTConfig:
    """SFT that reads all that it may: held-out files, and prompts to select an epoch by."""
    for name in ("demonstrations", "pretraining"):
        valid = files / f"{name}_valid.jsonl"
        if not valid.exists():
            shutil.copy(files / f"{name}.jsonl", valid)
    config = sft_config(files, directory, epochs=0.3)
    data = dataclasses.replace(
        config.data,
        valid=files / "demonstrations_valid.jsonl",
        pretraining_valid=files / "pretraining_valid.jsonl",
    )
    selection = SelectionConfig(
        reward_model=files / "reward_model",
        prompts=files / "prompts.jsonl",
        num_prompts=4,
        sampling=ppo_config(files, directory).sampling,
    )
    return dataclasses.replace(config, data=data, selection=selection, **changes)


def small_ppo(files: Path, directory: Path, **changes: Any) -> Any:
    return ppo_config(files, directory, **{"iterations": 1, "reference": None, **changes})


STAGES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "sft": (
        selecting,
        {
            "data.train": "demonstrations.jsonl",
            "data.valid": "demonstrations_valid.jsonl",
            "data.pretraining": "pretraining.jsonl",
            "data.pretraining_valid": "pretraining_valid.jsonl",
            "selection.prompts": "prompts.jsonl",
        },
    ),
    "rm": (
        rm_config,
        {"data.train": "comparisons.jsonl", "data.demonstrations": "demonstrations.jsonl"},
    ),
    "ppo": (
        small_ppo,
        {
            "data.prompts": "prompts.jsonl",
            "data.pretraining": "pretraining.jsonl",
            "data.pretraining_valid": "pretraining_valid.jsonl",
        },
    ),
}


def flip_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"mill", b"milk", 1))


def reverse(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


def more(config: Any) -> Any:
    """A config of a run that is to go further."""
    if hasattr(config, "iterations"):
        return dataclasses.replace(config, iterations=config.iterations + 1)
    return dataclasses.replace(config, epochs=2 * config.epochs)


def identity_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "identity.json").read_text())


def refusal(config: Any) -> str:
    """Return what a start is refused with, that leaves the run as it was."""
    names = ("identity.json", "config.json", "metrics.jsonl")
    before = [(config.directory / name).read_bytes() for name in names]
    with pytest.raises(UserError) as refused:
        train(config)
    assert [(config.directory / name).read_bytes() for name in names] == before
    assert not (config.directory / "sources.partial").exists()
    return str(refused.value)


@pytest.mark.parametrize("stage", STAGES)
def test_changed_data_is_named_whether_a_run_is_finished_or_not(stage: str, files: Path):
    make_config, fields = STAGES[stage]
    config = make_config(files, files / "run")
    train(config)
    recorded = identity_of(files / "run")["data"]
    assert recorded.keys() == fields.keys()
    for name, file in fields.items():
        path = files / file
        whole, digest = path.read_bytes(), recorded[name]["xxh3_128"][:8]
        num_records = len(whole.splitlines())
        assert recorded[name]["records"] == num_records
        for change in (flip_a_byte, reverse, cut):
            change(path)
            num_lines = len(path.read_bytes().splitlines())
            for started in (config, more(config)):
                said = refusal(started)
                assert f"{name} {num_records} records, {digest} -> {num_lines} lines, " in said
                assert said.endswith(f"--accept-changed {name}")
            path.write_bytes(whole)
    train(more(config))  # the content counts, and no time of a file


def test_all_changes_are_one_error(files: Path, monkeypatch: pytest.MonkeyPatch):
    config = rm_config(files, files / "run")
    train(config)
    reverse(files / "comparisons.jsonl")
    cut(files / "demonstrations.jsonl")
    versions = inputs.package_versions()
    monkeypatch.setattr(inputs, "package_versions", lambda: versions | {"torch": "9.9"})
    monkeypatch.setattr(inputs, "code_digest", lambda: "0123456789")
    said = refusal(config)
    assert f"torch {versions['torch']} -> 9.9" in said
    assert "-> 01234567" in said
    assert said.endswith("--accept-changed data.train data.demonstrations torch code")


def test_accepted_changes_are_recorded_and_then_the_runs_own(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small_ppo(files, files / "run")
    train(config)
    cut(files / "prompts.jsonl")
    monkeypatch.setattr(inputs, "code_digest", lambda: "0123456789")
    assert "data.prompts code" in refusal(config)
    partly = dataclasses.replace(config, accept_changed=("code",))
    said = refusal(partly)
    assert "code " not in said.splitlines()[0]
    assert said.endswith("--accept-changed data.prompts code")  # that given last counts alone
    accepting = ("data.prompts", "code", "torch", "policy")  # two of them did not change
    train(dataclasses.replace(more(config), accept_changed=accepting))
    first, second = identity_of(files / "run")["accepted"]
    assert (first["change"]["name"], second["change"]["name"]) == ("data.prompts", "code")
    assert first["step"] == second["step"] == 1
    assert first["change"]["old"].startswith("24 records, ")
    assert first["change"]["new"].startswith("21 lines, ")
    assert first["at"].startswith("20")
    assert identity_of(files / "run")["data"]["data.prompts"]["records"] == 21
    train(more(config))
    assert len(identity_of(files / "run")["accepted"]) == 2
    reverse(files / "prompts.jsonl")
    train(dataclasses.replace(more(config), accept_changed=("data.prompts",)))
    names = [each["change"]["name"] for each in identity_of(files / "run")["accepted"]]
    assert names == ["data.prompts", "code", "data.prompts"]


def test_what_was_accepted_once_is_not_accepted_by_whoever_starts_from_the_run(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    config = rm_config(files, files / "run")
    train(config)
    reverse(files / "comparisons.jsonl")
    options = ["--accept-changed", "data.train", "torch"]
    run_stage(train, config, options)  # type: ignore[arg-type]
    assert load_config(type(config), files / "run" / "config.json").accept_changed == ()
    reverse(files / "comparisons.jsonl")
    with pytest.raises(SystemExit) as stopped:
        run_stage(train, config, ["--config", str(files / "run")])  # type: ignore[arg-type]
    assert stopped.value.code == 2
    assert "--accept-changed data.train" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_name_is_an_error_that_lists_the_names(stage: str, files: Path):
    make_config, fields = STAGES[stage]
    config = make_config(files, files / "run", accept_changed=("torch", "dat.train"))
    with pytest.raises(UserError, match="'dat.train': no such name; there are ") as refused:
        train(config)
    assert all(name in str(refused.value) for name in (*fields, "code", "python"))
    assert not (files / "run").exists()


def test_start_before_the_first_checkpoint_writes_all_anew(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small_ppo(files, files / "run", reference=files / "reference")

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inputs, "write_identity", die)  # between the links and identity.json
        train(config)
    run = files / "run"
    assert not (run / "identity.json").exists()
    assert (run / "sources" / "policy").exists()
    (run / "sources.partial" / "policy").mkdir(parents=True)  # of one that was killed earlier
    cut(files / "prompts.jsonl")
    shutil.rmtree(files / "reference")
    train(dataclasses.replace(config, reference=None))
    assert sorted(p.name for p in (run / "sources").iterdir()) == ["reference", "reward_model"]
    assert not (run / "sources.partial").exists()
    found = identity_of(run)
    assert found["data"]["data.prompts"]["records"] == 21
    assert found["networks"]["reference"]["checkpoint"] == str(
        files / "policy" / "checkpoints" / step_name(0)
    )


def test_run_of_before_identities_is_told_of_and_gets_one(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    config = rm_config(files, files / "run")
    train(config)
    before = identity_of(files / "run")
    forget_identity(files / "run")
    reverse(files / "comparisons.jsonl")
    capsys.readouterr()
    train(config)
    assert "WARNING: " in (said := capsys.readouterr().err)
    assert f"{files / 'run' / 'identity.json'} is gone: nobody knows" in said
    assert identity_of(files / "run")["packages"] == before["packages"]
    assert identity_of(files / "run")["data"] != before["data"]


@pytest.mark.parametrize("stage", STAGES)
def test_identity_that_is_gone_is_taken_from_the_newest_checkpoint(stage: str, files: Path):
    make_config, fields = STAGES[stage]
    config, run = make_config(files, files / "run"), files / "run"
    train(config)
    before = identity_of(run)
    (saved,) = (run / "checkpoints").glob("step_*/identity.json")
    assert str(files) not in saved.read_text()
    (run / "identity.json").unlink()
    name, file = next(iter(fields.items()))
    whole = (files / file).read_bytes()
    cut(files / file)
    with pytest.raises(UserError, match=f"something else .*: {name} ") as refused:
        train(more(config))
    assert not (run / "identity.json").exists()
    (files / file).write_bytes(whole)
    train(config)
    found = identity_of(run)
    for part in ("packages", "code", "stage", "accepted"):
        assert found[part] == before[part]
    assert found["data"].keys() == before["data"].keys()
    (run / "identity.json").unlink()
    cut(files / file)
    accepting = str(refused.value).partition("--accept-changed ")[2].split()
    train(dataclasses.replace(more(config), accept_changed=(*accepting, "torch")))
    assert [each["change"]["name"] for each in identity_of(run)["accepted"]] == accepting
    (run / "identity.json").unlink()
    train(more(config))
    assert [each["change"]["name"] for each in identity_of(run)["accepted"]] == accepting


DAMAGE = {
    "empty": b"",
    "cut off": b'{"stage": "rm", "netw',
    "null": b"null",
    "of later": b'{"stage": "rm", "weather": 1}',
    "of another type": b'{"stage": 7}',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_damaged_identity_says_how_to_go_on(content: bytes, files: Path):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    (run / "identity.json").write_bytes(content)
    said = refusal(config)
    assert said.startswith(str(run / "identity.json"))
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert said.endswith(f"put it back, or remove it: it is taken from {checkpoint} then")
    (run / "identity.json").unlink()
    train(more(config))
    forget_identity(run)
    (run / "identity.json").write_bytes(content)
    assert refusal(config).endswith("or remove it: it is written anew, of what is here then")


def test_settings_that_are_gone_or_damaged_are_told_of(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    whole = (run / "config.json").read_bytes()
    for content in (b"", whole[:40], b"null"):
        (run / "config.json").write_bytes(content)
        said = refusal(config)
        assert said.startswith(str(run / "config.json"))
        assert "put it back, or remove it" in said
    (run / "config.json").unlink()
    capsys.readouterr()
    train(config)
    assert f"{run / 'config.json'} is gone: nothing holds this run" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == whole


def test_identity_that_is_no_file_is_not_passed_over(files: Path):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    (run / "identity.json").unlink()
    (run / "identity.json").symlink_to(files / "nowhere")
    with pytest.raises(UserError, match=r"identity\.json.* or remove it"):
        train(config)
    (run / "identity.json").unlink()
    (run / "identity.json").mkdir()
    with pytest.raises(UserError, match=r"identity\.json.* or remove it"):
        train(config)


def test_no_name_lets_another_tokenizer_pass(files: Path):
    config = sft_config(files, files / "run", tokenizer=files / "tokenizer.json")
    train(config)
    other = write_tokenizer(files / "other.json", vocab_size=90)
    said = refusal(dataclasses.replace(more(config), tokenizer=other))
    assert "which this run keeps: leave the option out" in said
    assert "accept-changed" not in said
    accepting = {"tokenizer": other, "accept_changed": ("tokenizer",)}
    assert "no such name" in refusal(dataclasses.replace(more(config), **accepting))
    train(dataclasses.replace(more(config), tokenizer=None))
    assert identity_of(files / "run")["accepted"] == []


def test_data_that_is_written_to_while_the_stage_loads_is_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    load = inputs.load_weights

    def load_and_write(*arguments: Any, **named: Any) -> None:
        load(*arguments, **named)
        reverse(files / "comparisons.jsonl")

    monkeypatch.setattr(inputs, "load_weights", load_and_write)
    with pytest.raises(UserError, match="data.train .*written to while it was read"):
        train(rm_config(files, files / "run"))
    assert not (files / "run").exists()


def resume_on_ranks(files: Path, layouts: list[ParallelLayout]) -> list[str]:
    """Start PPO under one layout, take its sources away, go on under another; then change data."""
    first, second = layouts
    config = small_ppo(files, files / "run", layout=first, saving=SaveConfig(save_every=1))
    train(config)
    if first == second:
        shutil.rmtree(files / "policy", ignore_errors=True)
        shutil.rmtree(files / "reward_model", ignore_errors=True)
    train(dataclasses.replace(more(config), layout=second))
    write_lines(files / "prompts.jsonl", [{"prompt": "the mill"}] * 9)
    with pytest.raises(UserError) as refused:
        train(dataclasses.replace(more(config), layout=second))
    return [str(refused.value), str(len(rows_of(files / "run")))]


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [(2, 2), (1, 1), (2, 1)])
def test_ranks_find_out_together(layouts: tuple[int, int], files: Path):
    wanted = [ParallelLayout(tp=tp) for tp in layouts]
    first, second = run_ranks(resume_on_ranks, 2, files, wanted)
    assert first == second
    assert "data.prompts 24 records" in first[0]
    assert first[1] == "2"
