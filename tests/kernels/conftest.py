"""Where a kernel test runs: on the torch reference, or on the Triton kernels in the interpreter."""

import pytest
import torch

from kernels import launch


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors run the Triton kernels in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not launch.interpreting():
        pytest.skip("kernels are compiled here; run with TRITON_INTERPRET=1 to interpret them")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test twice: on the torch reference and on the interpreted kernels."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param
