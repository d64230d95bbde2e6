import importlib.metadata
import platform
from pathlib import Path

import pytest
import torch

from engine.process import software
from engine.process.software import PACKAGES, code_commit, code_digest, package_versions


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of three files."""
    for name in ("engine/sft.py", "models/gpt.py", "kernels/gae.py"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(software, "_ROOT", tmp_path)
    return tmp_path


def test_versions_are_those_that_are_installed():
    found = package_versions()
    assert set(found) == {"python", *PACKAGES}
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["megatron-core"] == importlib.metadata.version("megatron-core")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(software, "PACKAGES", ("torch", "no-such-package"))
    assert package_versions()["no-such-package"] == "none"


def test_code_is_the_same_until_a_file_of_it_changes(project: Path):
    before = code_digest()
    (project / "engine" / "notes.txt").write_text("no code")
    (project / "tests").mkdir()
    (project / "tests" / "test_sft.py").write_text("no code that runs")
    assert code_digest() == before
    for change in (
        lambda: (project / "kernels" / "gae.py").write_text("# another\n"),
        lambda: (project / "engine" / "more.py").write_text(""),
        lambda: (project / "engine" / "more.py").rename(project / "engine" / "other.py"),
    ):
        change()
        assert code_digest() != before
        before = code_digest()


def test_a_copy_without_a_repository_has_no_commit(project: Path):
    code_commit.cache_clear()
    assert code_commit() == ""
    (project / ".git").mkdir()
    code_commit.cache_clear()
    assert code_commit() == ""  # no commit yet, or no git
    code_commit.cache_clear()
