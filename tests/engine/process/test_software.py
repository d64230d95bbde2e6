import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.process import software
from engine.process.software import PACKAGES, code_commit, code_digest, package_versions


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of three files, which this process has not seen."""
    for name in ("engine/sft.py", "models/gpt.py", "kernels/gae.py"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(software, "_ROOT", tmp_path)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


def digest_anew() -> str:
    """What another process finds."""
    code_digest.cache_clear()
    return code_digest()


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
    before = digest_anew()
    (project / "engine" / "notes.txt").write_text("no code")
    (project / "tests").mkdir()
    (project / "tests" / "test_sft.py").write_text("no code that runs")
    assert digest_anew() == before
    for change in (
        lambda: (project / "kernels" / "gae.py").write_text("# another\n"),
        lambda: (project / "engine" / "more.py").write_text(""),
        lambda: (project / "engine" / "more.py").rename(project / "engine" / "other.py"),
    ):
        change()
        assert digest_anew() != before
        before = code_digest()


def test_code_is_read_once_a_process(project: Path):
    before = code_digest()
    (project / "kernels" / "gae.py").write_text("# another\n")
    assert code_digest() == before  # which this process has loaded


def test_a_copy_without_a_repository_has_no_commit(project: Path):
    code_commit.cache_clear()
    assert code_commit() == ""
    (project / ".git").mkdir()
    code_commit.cache_clear()
    assert code_commit() == ""  # no commit yet, or no git
    code_commit.cache_clear()
