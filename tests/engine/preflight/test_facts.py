import importlib.metadata
import platform
import shutil
from pathlib import Path

import pytest
import torch

from engine.preflight.facts import (
    GIB,
    cache_error,
    code_version,
    disk_facts,
    free_memory,
    versions,
)


def test_code_version_sees_contents_and_names(tmp_path: Path):
    (tmp_path / "engine").mkdir()
    source = tmp_path / "engine" / "a.py"
    source.write_text("x = 1")
    seen = [code_version(tmp_path), code_version(tmp_path)]
    source.write_text("x = 2")
    seen.append(code_version(tmp_path))
    source.rename(source.with_name("b.py"))
    seen.append(code_version(tmp_path))
    assert len(seen) == 4
    assert len(set(seen)) == 3
    assert seen[0] == seen[1]


def test_versions_are_those_of_the_code_and_of_what_it_stands_on(monkeypatch: pytest.MonkeyPatch):
    found = versions()
    assert found["code"] == code_version()
    assert found["Python"] == platform.python_version()
    for package in ("torch", "megatron-core"):
        assert found[package] == importlib.metadata.version(package)

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "torch" not in versions()  # and no error


def test_free_memory_of_a_cpu_is_its_nodes(monkeypatch: pytest.MonkeyPatch):
    class Memory:
        available = 3 * GIB

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert free_memory(torch.device("cpu")) == 3 * GIB


def test_disk_that_can_be_written_tells_its_free_space(tmp_path: Path):
    folder = tmp_path / "runs" / "new"
    found = disk_facts(folder, rank=3)
    assert found == {"disk_gib": pytest.approx(shutil.disk_usage(tmp_path).free / GIB, rel=0.05)}
    assert list(folder.iterdir()) == []  # what was written is gone


def test_disk_that_gives_back_something_else_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"something else")
    assert disk_facts(tmp_path, rank=0) == {
        "disk_error": "a file reads otherwise than it was written"
    }
    assert list(tmp_path.iterdir()) == []


def test_folders_of_compiled_kernels_are_the_nodes_own(tmp_path: Path, monkeypatch):
    folders = {"TRITON_CACHE_DIR": tmp_path / "triton", "CUDA_CACHE_PATH": tmp_path / "cuda"}
    monkeypatch.setattr("engine.preflight.facts.cache_folders", lambda: folders)
    monkeypatch.setattr("engine.preflight.facts.shared_file_system", lambda path: "")
    assert cache_error(rank=0) == ""
    (tmp_path / "cuda").rmdir()
    (tmp_path / "cuda").touch()
    error = f"CUDA_CACHE_PATH {tmp_path / 'cuda'}: cannot be written: File exists"
    assert cache_error(rank=0) == error
    monkeypatch.setattr("engine.preflight.facts.shared_file_system", lambda path: "lustre")
    error = f"TRITON_CACHE_DIR {tmp_path / 'triton'}: lies on lustre, which nodes share"
    assert cache_error(rank=0) == error
