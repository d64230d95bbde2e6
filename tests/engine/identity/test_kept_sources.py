"""A run goes on with the networks of its first start, whatever becomes of where they came from."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import __main__ as checkpoints_command
from engine.checkpoints import sources
from engine.errors import UserError
from engine.settings.saving import SaveConfig
from engine.settings.sft import SelectionConfig
from tests.engine.identity.before_identities import forget_identity
from tests.tiny import (
    EVERY_STEP,
    ppo_config,
    rm_config,
    rows_of,
    sft_config,
    train,
    train_until,
    weights_of,
)


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> Path:
    """The tiny recipe's files, and a policy and a reward model that this run's user has trained."""
    files = shutil.copytree(tiny, tmp_path / "files")
    train(policy_run(files))
    train(reward_run(files))
    return files


def policy_run(files: Path, **changes: Any) -> Any:
    changes = {"epochs": 0.3, "saving": SaveConfig(keep=1), **changes}
    return sft_config(files, files / "sft", **changes)


def reward_run(files: Path, **changes: Any) -> Any:
    changes = {"epochs": 0.5, "saving": SaveConfig(keep=1), **changes}
    return rm_config(files, files / "rm", **changes)


def ppo_run(files: Path, name: str, **changes: Any) -> Any:
    config = ppo_config(
        files,
        files / name,
        policy=files / "sft",
        reward_model=files / "rm",
        reference=None,
        saving=EVERY_STEP,
        eval_every=1,  # a run that is made longer was looked at at its earlier end too
    )
    return dataclasses.replace(config, **changes)


def continued(files: Path) -> None:
    train(policy_run(files, epochs=0.9))
    train(reward_run(files, epochs=1.0))


def retrained(files: Path) -> None:
    removed(files)
    train(policy_run(files, seed=5))
    train(reward_run(files, seed=5))


def removed(files: Path) -> None:
    shutil.rmtree(files / "sft")
    shutil.rmtree(files / "rm")


def moved(files: Path) -> None:
    (files / "sft").rename(files / "sft_old")
    (files / "rm").rename(files / "rm_old")


def selected(files: Path) -> None:
    """An epoch's weights are made those that the runs are known by."""
    for stage, run in (("policy", "sft"), ("reward_model", "rm")):
        source = files / stage / "checkpoints" / "step_00000000"
        shutil.copytree(source, files / run / "checkpoints" / "step_00000000")
        (files / run / "checkpoints" / "selected").write_text("step_00000000")


def pruned(files: Path) -> None:
    """Only the checkpoints that were taken are gone."""
    for run in ("sft", "rm"):
        (folder,) = (files / run / "checkpoints").glob("step_*")
        shutil.rmtree(folder)


def assert_same(ours: Path, theirs: Path, roles: tuple[str, ...]) -> None:
    assert rows_of(ours) == rows_of(theirs)
    for role in roles:
        a, b = weights_of(ours, role), weights_of(theirs, role)
        assert all(torch.equal(a[name], b[name]) for name in b), role


@pytest.mark.parametrize("disturb", [continued, retrained, removed, moved, selected, pruned])
def test_ppo_keeps_its_reference_and_reward_model(
    disturb: Callable[[Path], None], files: Path, capsys: pytest.CaptureFixture[str]
):
    train(ppo_run(files, "whole"))
    train_until(ppo_run(files, "ppo"), 1)
    disturb(files)
    capsys.readouterr()
    train(ppo_run(files, "ppo"))
    said = capsys.readouterr().out.replace("\n", "")
    assert_same(files / "ppo", files / "whole", ("policy", "critic", "ema"))
    assert len({row["score/kl"] for row in rows_of(files / "ppo")}) == 2
    for run in ("sft", "rm"):
        assert f"{files / run}" in said and "this run keeps its own copy of it" in said
    if disturb is continued:
        assert f"{files / 'sft'} has gone on since: step 2 -> 5;" in said


def test_nothing_is_said_of_sources_that_are_as_they_were(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    train(ppo_run(files, "ppo", iterations=1))
    train(ppo_run(files, "ppo"))
    assert "this run keeps" not in capsys.readouterr().out


def test_copies_on_another_file_system_serve_as_well(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train(ppo_run(files, "whole"))

    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", refuse)
        train_until(ppo_run(files, "ppo"), 1)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"copied to {files / 'ppo' / 'sources' / 'reference'}" in said
    removed(files)
    train(ppo_run(files, "ppo"))
    assert_same(files / "ppo", files / "whole", ("policy", "critic", "ema"))


def test_policy_that_still_trains_is_taken_at_one_step(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the links of PPO's start its source goes on, and removes what PPO takes."""
    link, calls = sources._link, []

    def train_and_link(path: Path, copy: Path, num_bytes: int) -> bool:
        calls.append(path)
        if len(calls) == 2:
            monkeypatch.setattr(sources, "_link", link)
            shutil.copytree(
                files / "sft" / "checkpoints" / "step_00000002", files / "later", symlinks=True
            )
            train(policy_run(files, epochs=0.6))
        return link(path, copy, num_bytes)

    monkeypatch.setattr(sources, "_link", train_and_link)
    train(ppo_run(files, "ppo"))
    monkeypatch.undo()
    train(ppo_run(files, "whole"))
    assert_same(files / "ppo", files / "whole", ("policy", "critic"))


def test_reference_of_its_own_is_kept_beside_the_policy(files: Path):
    config = ppo_run(files, "ppo", reference=files / "reference", iterations=1)
    train(config)
    kept = sorted(path.name for path in (files / "ppo" / "sources").iterdir())
    assert kept == ["policy", "reference", "reward_model"]
    train(dataclasses.replace(config, directory=files / "whole", iterations=2))
    removed(files)
    shutil.rmtree(files / "reference")
    train(dataclasses.replace(config, iterations=2))
    assert_same(files / "ppo", files / "whole", ("policy", "critic"))


def reference_is_a_link(files: Path) -> dict[str, Path]:
    (files / "link").symlink_to(files / "sft")
    return {"policy": files / "sft", "reference": files / "link"}


def policy_is_a_link(files: Path) -> dict[str, Path]:
    (files / "link").symlink_to(files / "sft")
    return {"policy": files / "link", "reference": files / "sft"}


def both_are_folders(files: Path) -> dict[str, Path]:
    return {"policy": files / "sft", "reference": files / "reference"}


def repoint(files: Path) -> None:
    (files / "link").unlink()
    (files / "link").symlink_to(files / "reference")


def take_away(files: Path) -> None:
    (files / "sft").rename(files / "sft_old")
    (files / "link").unlink()


def make_one(files: Path) -> None:
    (files / "reference").rename(files / "reference_old")
    (files / "reference").symlink_to(files / "sft")


@pytest.mark.parametrize(
    ("paths", "disturb"),
    [
        (policy_is_a_link, repoint),
        (policy_is_a_link, take_away),
        (reference_is_a_link, repoint),
        (reference_is_a_link, take_away),
        (both_are_folders, make_one),
    ],
)
@pytest.mark.parametrize("forget", [None, forget_identity])
def test_paths_that_come_to_mean_something_else_change_no_run(
    paths: Callable[[Path], dict[str, Path]],
    disturb: Callable[[Path], None],
    forget: Callable[[Path], None] | None,
    files: Path,
):
    config = ppo_run(files, "ppo", **paths(files))
    train(dataclasses.replace(config, directory=files / "whole"))
    train_until(config, 1)
    run = files / "ppo"
    before = {path.name: path.stat().st_mtime_ns for path in (run / "sources").iterdir()}
    assert set(before) - {"reward_model"} == (
        {"policy", "reference"} if paths is both_are_folders else {"reference"}
    )
    disturb(files)
    if forget is not None:
        forget(run)
    train(config)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "sources").iterdir()} == before
    assert_same(run, files / "whole", ("policy", "critic"))


def test_copy_that_is_gone_is_taken_from_the_reference_again(files: Path):
    config = ppo_run(files, "ppo", **policy_is_a_link(files))
    train(dataclasses.replace(config, directory=files / "whole"))
    train_until(config, 1)
    repoint(files)
    shutil.rmtree(files / "ppo" / "sources")
    train(config)
    assert_same(files / "ppo", files / "whole", ("policy", "critic"))
    assert sorted(p.name for p in (files / "ppo" / "sources").iterdir()) == [
        "reference",
        "reward_model",
    ]


def test_run_whose_folder_was_emptied_keeps_its_reference(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    config = ppo_run(files, "ppo")
    train(dataclasses.replace(config, directory=files / "whole"))
    train_until(config, 1)
    (files / "ppo" / "identity.json").unlink()
    shutil.rmtree(files / "ppo" / "sources")
    (files / "sft").rename(files / "sft_old")
    shutil.copytree(files / "reference", files / "sft")
    with pytest.raises(UserError, match="made from something else") as refused:
        train(config)
    assert str(refused.value).endswith("--accept-changed policy reference")
    assert not (files / "ppo" / "sources").exists()
    shutil.rmtree(files / "sft")
    (files / "sft_old").rename(files / "sft")
    train(config)
    said = capsys.readouterr().err.replace("\n", "")
    assert f"{files / 'ppo' / 'identity.json'} is gone: it is taken from " in said
    assert_same(files / "ppo", files / "whole", ("policy", "critic"))


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_supervised_run_goes_on_without_what_it_started_from(stage: str, files: Path):
    make_config = {"sft": sft_config, "rm": rm_config}[stage]
    config = make_config(files, files / "whole", init_from=files / "sft", saving=EVERY_STEP)
    train(config)
    stopped = dataclasses.replace(config, directory=files / "stopped")
    train_until(stopped, 1)
    removed(files)
    train(stopped)
    assert_same(
        files / "stopped", files / "whole", ("policy",) if stage == "sft" else ("reward_model",)
    )


def test_selection_goes_on_with_the_reward_model_that_it_began_with(files: Path):
    selection = SelectionConfig(
        reward_model=files / "rm",
        num_prompts=4,
        sampling=ppo_config(files, files).sampling,
    )
    config = sft_config(files, files / "whole", epochs=2.0, saving=EVERY_STEP, selection=selection)
    train(config)
    stopped = dataclasses.replace(config, directory=files / "stopped")
    train_until(stopped, 5)
    retrained(files)
    train(stopped)
    assert_same(files / "stopped", files / "whole", ("policy",))
    assert len([row for row in rows_of(files / "stopped") if "valid/reward" in row]) == 2


def test_damaged_copy_is_an_error_that_says_how_it_is_had_again(files: Path):
    config = ppo_run(files, "ppo", iterations=1)
    train(config)
    path = files / "ppo" / "sources" / "reference" / "policy" / "weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()  # and so the source keeps its file
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    further = dataclasses.replace(config, iterations=2)
    folder = path.parents[1]
    with pytest.raises(UserError, match=f"{path}: damaged.*; remove {folder}, and it is taken"):
        train(further)
    assert checkpoints_command.main(["verify", str(files / "ppo")]) == 1
    shutil.rmtree(folder)
    train(further)
    train(ppo_run(files, "whole"))
    assert_same(files / "ppo", files / "whole", ("policy", "critic"))
    assert checkpoints_command.main(["verify", str(files / "ppo")]) == 0


def test_copy_that_was_exchanged_is_another_reference(files: Path):
    config = ppo_run(files, "ppo", iterations=1)
    train(config)
    train(ppo_run(files, "other", policy=files / "policy", iterations=1))
    shutil.rmtree(files / "ppo" / "sources" / "reference")
    shutil.copytree(
        files / "other" / "sources" / "reference", files / "ppo" / "sources" / "reference"
    )
    further = dataclasses.replace(config, iterations=2)
    with pytest.raises(UserError, match="--accept-changed policy reference$"):
        train(further)
    train(dataclasses.replace(further, accept_changed=("policy", "reference")))
    assert rows_of(files / "ppo")[1]["score/kl"] > 0.1


def test_policy_of_ppo_is_told_to_be_a_new_reference(
    files: Path, capsys: pytest.CaptureFixture[str]
):
    train(ppo_run(files, "ppo", iterations=1))
    assert "is itself a PPO run" not in capsys.readouterr().out
    old = files / "ppo" / "sources" / "reference"
    train(ppo_run(files, "second", policy=files / "ppo", iterations=1))
    said = capsys.readouterr().out.replace("\n", " ")
    assert "is itself a PPO run" in said and f"--reference {old}" in said
    train(ppo_run(files, "third", policy=files / "ppo", reference=old, iterations=1))
    assert "is itself a PPO run" not in capsys.readouterr().out
    newer, kept = (rows_of(files / name)[0]["score/kl"] for name in ("second", "third"))
    assert abs(newer) < 1e-4 < abs(kept)


def test_checkpoint_of_a_run_brings_its_tokenizer(files: Path):
    (checkpoint,) = (files / "sft" / "checkpoints").glob("step_*")
    for number, policy in enumerate((checkpoint, checkpoint / "policy")):
        train(ppo_run(files, f"ppo{number}", policy=policy, iterations=1))
    assert rows_of(files / "ppo0") == rows_of(files / "ppo1")


def test_sources_are_shown_beside_checkpoints(files: Path, capsys: pytest.CaptureFixture[str]):
    train(ppo_run(files, "ppo", iterations=1))
    capsys.readouterr()
    assert checkpoints_command.main(["verify", str(files / "ppo")]) == 0
    said = capsys.readouterr().out
    assert f"{files / 'ppo' / 'sources' / 'reward_model'}: whole, 3 files" in said
    assert checkpoints_command.main(["inspect", str(files / "ppo")]) == 0
    assert "weights alone" in capsys.readouterr().out
