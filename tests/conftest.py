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

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"kernels.{module.name}")


def pytest_configure(config: pytest.Config) -> None:
    """Have hypothesis draw as many inputs as are asked for, the same ones in every run."""
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "fuzz",
        max_examples=config.getoption("--fuzz-inputs"),
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
        default=300,
        help="inputs that each test marked fuzz generates (a long run: 100000)",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=20,
        help="how often tests/engine/checkpoints/test_kills.py kills runs (a long run: 300)",
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny.py: a tokenizer, training files and checkpoints to start from."""
    from tests.tiny import write_checkpoints, write_files  # brings megatron, not for every test

    folder = tmp_path_factory.mktemp("tiny")
    write_files(folder)
    write_checkpoints(folder)
    return folder
