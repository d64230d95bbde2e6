"""The gated activation of an MLP, SiLU as in Llama: columns x [T, 2F] to [T, F], in bf16."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_suite.operation import (
    Cost,
    Expected,
    Inputs,
    Mode,
    Operation,
    Provider,
    Size,
    compiled,
    plain,
    weighted_sum,
)
from kernels.gated import gated, gated_reference

# The MLPs of Llama 2's 7B, Llama 3's 8B and SmolLM2's 135M.
_SIZES = {
    "cuda": [
        {"tokens": 8192, "columns": 11008},
        {"tokens": 8192, "columns": 14336},
        {"tokens": 131072, "columns": 1536},
        {"tokens": 64, "columns": 14336},
    ],
    "cpu": [{"tokens": 512, "columns": 1536}, {"tokens": 512, "columns": 11008}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    options: Any = {"dtype": torch.bfloat16, "device": device}
    return {
        "x": torch.randn(size["tokens"], 2 * size["columns"], **options),
        "upstream": {"activated": torch.randn(size["tokens"], size["columns"], **options)},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    x = inputs["x"].detach().double().requires_grad_()
    activated = _torch(x)
    (gradient,) = torch.autograd.grad(weighted_sum({"activated": activated}, inputs["upstream"]), x)
    tensors = {"activated": activated.detach(), "x_grad": gradient}
    return {name: Expected(tensor, 0.02, is_relative=True) for name, tensor in tensors.items()}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Forward reads two and writes one; backward reads the two and a gradient, and writes two.
    num_columns = 3 if mode == "forward" else 8
    return Cost(num_bytes=inputs["x"].nbytes // 2 * num_columns)


def _ours(x: Tensor) -> Tensor:
    return gated(x, "silu")


def _torch(x: Tensor) -> Tensor:
    return gated_reference(x, "silu")


GATED = Operation(
    name="gated",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("x",),
    outputs=("activated",),
    gradients=("x",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("torch", plain(_torch)),
        Provider("torch.compile", compiled(_torch), needs_gpu=True),
    ),
)
