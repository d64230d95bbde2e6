"""Decorates the kernels for Triton's interpreter on machines without a GPU.

Triton chooses between compiler and interpreter when it decorates a kernel, from TRITON_INTERPRET.
So the variable is set while every kernel is imported, before any test is, and then put back: tests
and the ranks they spawn take the torch reference for CPU tensors, and a test that wants the
interpreter sets the variable again (the fixtures of tests/kernels/conftest.py).
"""

import importlib
import os
import pkgutil
from pathlib import Path

import pytest
import torch

import kernels

if torch.cuda.is_available():  # what `numerics.deterministic` wants before the first product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"kernels.{module.name}")


def pytest_configure(config: pytest.Config) -> None:
    """Have hypothesis draw as many inputs as are asked for, the same ones in every run."""
    from hypothesis import HealthCheck, Phase, settings

    for name, usual in (("fuzz", 300), ("proved", 40)):
        settings.register_profile(
            name,
            max_examples=config.getoption("--fuzz-inputs") or usual,
            deadline=None,  # a busy machine would miss one
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            print_blob=False,
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-inputs",
        type=int,
        default=0,
        help="inputs of each test that generates its own: 300 where it is marked fuzz, and a few "
        "elsewhere, unless it is said here (a long run: 100000)",
    )
    parser.addoption(
        "--chaos",
        type=int,
        default=20,
        help="how often tests/chaos kills, stops and signals runs (a long run: 1000)",
    )
    parser.addoption(
        "--chaos-seed", type=int, default=0, help="draws other moments (a long run in parts)"
    )
    parser.addoption(
        "--soak",
        type=int,
        default=100,
        help="steps of each run of tests/chaos/test_soak.py (a long run: 2000)",
    )
    parser.addoption(
        "--record",
        help="a file that tests marked chaos, and test_families_around.py, append what they saw "
        "to, a JSON line each",
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny.py: a tokenizer, training files and checkpoints to start from."""
    from tests.tiny import write_checkpoints, write_files  # brings megatron, not for every test

    folder = tmp_path_factory.mktemp("tiny")
    write_files(folder)
    write_checkpoints(folder)
    return folder
