"""A run's folder says in one way what it is held to, or nothing goes on."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.manifest import digest_of_bytes, read_manifest, write_manifest
from engine.checkpoints.retention import step_name
from engine.errors import UserError
from engine.identity import inputs
from engine.identity.record import IDENTITY
from engine.settings.saving import SaveConfig
from tests.engine.identity.test_inputs import cut, identity_of, more, refusal, reverse
from tests.tiny import rm_config, train


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny recipe's files and runs, which may be changed."""
    return shutil.copytree(tiny, tmp_path / "files")


def with_torch(found: dict[str, Any]) -> None:
    found["packages"]["torch"] = "1.0"


def with_code(found: dict[str, Any]) -> None:
    found["code"]["xxh3_128"] = "0" * 32


def with_data(found: dict[str, Any]) -> None:
    found["data"]["data.train"]["xxh3_128"] = "0" * 32


def without_data(found: dict[str, Any]) -> None:
    del found["data"]["data.train"]


def with_network(found: dict[str, Any]) -> None:
    found["networks"]["init_from"]["xxh3_128"] = "0" * 32


def with_tokenizer(found: dict[str, Any]) -> None:
    found["tokenizer"]["sha256"] = "0" * 64


def with_acceptance(found: dict[str, Any]) -> None:
    change = {"name": "torch", "old": "0.9", "new": "1.0"}
    found["accepted"] = [{"change": change, "step": 0, "at": "then"}]
    with_code(found)


EDITS = {
    with_torch: "torch",
    with_code: "code",
    with_data: "data.train",
    without_data: "data.train",
    with_network: "init_from",
    with_acceptance: "code",
}


@pytest.fixture(scope="module")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's run, with what it was made from."""
    files = shutil.copytree(tiny, tmp_path_factory.mktemp("begun") / "files")
    train(rm_config(files, files / "run"))
    return files


@pytest.mark.parametrize("edit", EDITS)
def test_edited_identity_is_named_with_the_checkpoint_that_says_otherwise(
    edit: Callable[[dict[str, Any]], None], begun: Path
):
    config, run = rm_config(begun, begun / "run"), begun / "run"
    whole = (run / IDENTITY).read_bytes()
    found = json.loads(whole)
    edit(found)
    (run / IDENTITY).write_text(json.dumps(found))
    said = refusal(config)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert said.startswith(f"{checkpoint / IDENTITY} says {EDITS[edit]} ")
    assert f"as {run / IDENTITY} does" in said and "accept-changed" not in said
    assert said.endswith(f"remove {run / IDENTITY}: it is taken from there then")
    (run / IDENTITY).unlink()
    train(config)
    assert identity_of(run)["code"] == json.loads(whole)["code"]


def test_what_changed_besides_is_told_with_it(files: Path):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    found = identity_of(run)
    with_code(found)
    (run / IDENTITY).write_text(json.dumps(found))
    reverse(files / "comparisons.jsonl")
    said = refusal(dataclasses.replace(config, seed=99))
    assert "is a run with seed " in said and "remove " in said
    assert said.endswith("--accept-changed data.train")
    (run / IDENTITY).unlink()
    train(dataclasses.replace(config, accept_changed=("data.train",)))


def test_checkpoints_of_another_run_are_not_gone_on_from(files: Path):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    cut(files / "comparisons.jsonl")
    train(dataclasses.replace(config, directory=files / "other"))
    cut(files / "demonstrations.jsonl")
    (run / "checkpoints").rename(run / "mine")
    shutil.copytree(files / "other" / "checkpoints", run / "checkpoints")
    said = refusal(more(config))
    assert f"{IDENTITY} says data.train 21 records, " in said and ", not 24 records, " in said
    assert "data.demonstrations" in said.splitlines()[0]  # which neither says
    shutil.rmtree(run / "checkpoints")
    (run / "mine").rename(run / "checkpoints")
    accepting = ("data.train", "data.demonstrations")
    train(dataclasses.replace(more(config), accept_changed=accepting))


def test_what_was_accepted_since_a_checkpoint_is_no_disagreement(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    saving = SaveConfig(save_every=1, keep=9)
    config, run = rm_config(files, files / "run", saving=saving), files / "run"
    train(config)
    for changed in (cut, reverse):
        changed(files / "comparisons.jsonl")
        train(dataclasses.replace(config, accept_changed=("data.train",)))  # and no checkpoint
    monkeypatch.setattr(inputs, "code_digest", lambda: "0123456789")
    further = more(config)
    train(dataclasses.replace(further, accept_changed=("code",)))
    (run / "checkpoints" / "latest").write_text(step_name(1))  # back to before all of it
    train(further)
    assert [e["change"]["name"] for e in identity_of(run)["accepted"]] == [
        *("data.train", "data.train", "code")
    ]
    found = identity_of(run)
    found["accepted"] = found["accepted"][:1]
    (run / IDENTITY).write_text(json.dumps(found))
    assert "says accepted data.train data.train code, not data.train, as " in refusal(further)


def test_older_checkpoint_that_is_taken_instead_is_held_to_it_too(files: Path):
    config = rm_config(files, files / "run", saving=SaveConfig(save_every=1, keep=9))
    train(config)
    newest, older = sorted((files / "run" / "checkpoints").glob("step_*"), reverse=True)[:2]
    found = json.loads((older / IDENTITY).read_text())
    with_torch(found)
    content = json.dumps(found).encode()
    (older / IDENTITY).write_bytes(content)
    manifest = read_manifest(older)
    named = {**manifest.files, IDENTITY: digest_of_bytes(content)}
    write_manifest(older, dataclasses.replace(manifest, files=named))
    train(config)
    weights = next(newest.glob("*/weights-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{older / IDENTITY} says torch 1.0, not "):
        train(config)


def test_tokenizer_is_the_checkpoints_too(files: Path):
    config, run = rm_config(files, files / "run"), files / "run"
    train(config)
    found = identity_of(run)
    with_tokenizer(found)
    (run / IDENTITY).write_text(json.dumps(found))
    with pytest.raises(UserError, match="tokenizer"):
        train(config)
