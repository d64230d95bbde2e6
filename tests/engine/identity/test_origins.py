import os
from pathlib import Path

import pytest

from engine.checkpoints.manifest import MANIFEST
from engine.identity.made_from import NamedNetwork
from engine.identity.origins import note_of_origin
from engine.identity.record import NetworkRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face's, and in copy/ what a run has taken of it a second later."""
    for name in ("hf/config.json", "hf/model.safetensors", "hf/README.md", f"copy/{MANIFEST}"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1e9, 1e9 + (path.name == MANIFEST)))
    return tmp_path / "hf"


def note(folder: Path) -> str:
    network = NamedNetwork(path=folder, role="policy", kept_as="init_from", strict=True)
    return note_of_origin(NetworkRecord(model_xxh3_128="ab"), network, folder.parent / "copy")


def test_a_folder_that_is_as_it_was_or_gone_needs_no_word(folder):
    (folder / "README.md").touch()
    assert note(folder) == ""
    assert note(folder.rename(folder.with_name("moved")).with_name("hf")) == ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_whose_model_was_written_to_since_is_said(folder, name):
    (folder / name).touch()
    said = f"{folder} was written to since this run took its model; this run keeps its own copy"
    assert note(folder).startswith(said)


def test_a_copy_without_a_manifest_says_nothing(folder):
    (folder / "model.safetensors").touch()
    (folder.parent / "copy" / MANIFEST).unlink()
    assert note(folder) == ""
