"""Where a kernel runs, and with which configuration."""

import ast
import re
from pathlib import Path

import pytest
import torch

from kernels import launch


def test_cpu_tensors_take_the_reference_unless_interpreting(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.zeros(1)
    assert launch.uses_triton(tensor)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not launch.uses_triton(tensor)


def test_a_variable_set_after_the_import_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_DECORATED_FOR_INTERPRETER", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not launch.interpreting()


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)]
)
def test_next_power_of_2(n: int, power: int) -> None:
    assert launch.next_power_of_2(n) == power


@pytest.mark.parametrize(("block", "warps"), [(1, 1), (256, 1), (1024, 4), (4096, 16), (65536, 16)])
def test_num_warps_grow_with_the_block(block: int, warps: int) -> None:
    assert launch.num_warps_for(block) == warps


def test_a_block_is_no_longer_than_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: "sm90")
    device = torch.device("cpu")
    assert launch.config_for("row_state", 100, device).block == 128
    long_row = launch.config_for("row_state", 50304, device)
    assert long_row == launch.LAUNCHES["default"]["row_state"]


@pytest.mark.parametrize(
    "path", sorted(Path(launch.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_every_launch_is_on_the_device_of_its_tensors(path: Path) -> None:
    tree = ast.parse(path.read_text())
    on_device = {
        inner
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        and ast.unparse(block.items[0].context_expr).startswith("torch.cuda.device_of(")
        for inner in ast.walk(block)
    }
    launches = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value).endswith("_kernel")
    ]
    kernels = set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert kernels <= named  # each is launched, or handed to what is
    assert launches or not kernels
    assert on_device.issuperset(launches)
