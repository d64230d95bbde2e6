"""Residual addition and layer normalisation of x [T, H] in bf16."""

from typing import Any

import torch
import torch.nn.functional as F
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
from kernels.layer_norm import layer_norm

_EPS = 1e-5

_SIZES = {
    "cuda": [
        {"tokens": 8192, "hidden": 2048},
        {"tokens": 8192, "hidden": 768},
        {"tokens": 8192, "hidden": 4096},
        {"tokens": 8192, "hidden": 12288},
        {"tokens": 131072, "hidden": 2048},
    ],
    "cpu": [{"tokens": 512, "hidden": 768}, {"tokens": 512, "hidden": 2048}],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    shape, width = (size["tokens"], size["hidden"]), size["hidden"]
    options: Any = {"dtype": torch.bfloat16, "device": device}
    return {
        "x": torch.randn(shape, **options),
        "residual": torch.randn(shape, **options),
        "weight": 1 + 0.1 * torch.randn(width, **options),
        "bias": 0.1 * torch.randn(width, **options),
        "upstream": {
            "normed": torch.randn(shape, **options),
            "hidden": torch.randn(shape, **options),
        },
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    names = LAYER_NORM.arguments
    # The sum x + residual is rounded to bf16 before it is normalised, by everybody.
    rounded = (inputs["x"] + inputs["residual"]).detach().double().requires_grad_()
    weight, bias = (inputs[name].detach().double().requires_grad_() for name in names[2:])
    normed = F.layer_norm(rounded, weight.shape, weight, bias, _EPS)
    total = weighted_sum({"normed": normed, "hidden": rounded}, inputs["upstream"])
    gradients = torch.autograd.grad(total, (rounded, weight, bias))
    tensors = {
        "normed": normed.detach(),
        "hidden": rounded.detach(),
        **dict(zip(("x_grad", "weight_grad", "bias_grad"), gradients, strict=True)),
    }
    return {name: Expected(x, 0.05, is_relative=True) for name, x in tensors.items()}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Forward reads two and writes two; backward reads the sum and two gradients, writes one.
    return Cost(num_bytes=inputs["x"].nbytes * (4 if mode == "forward" else 8))


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return layer_norm(x, weight, bias, eps=_EPS, residual=residual)


def _torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    hidden = x + residual
    return F.layer_norm(hidden, weight.shape, weight, bias, _EPS), hidden


def _liger() -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def normed_and_sum(x: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        hidden = x + residual
        return LigerLayerNormFunction.apply(hidden, *affine, _EPS), hidden

    return normed_and_sum


def _flash_attn() -> Any:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda x, residual, weight, bias: layer_norm_fn(
        x, weight, bias, residual=residual, eps=_EPS, prenorm=True
    )


def _apex() -> Any:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    def normed_and_sum(x: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        hidden = x + residual
        return fused_layer_norm_affine(hidden, *affine, affine[0].shape, _EPS), hidden

    return normed_and_sum


LAYER_NORM = Operation(
    name="layer_norm",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("x", "residual", "weight", "bias"),
    outputs=("normed", "hidden"),
    gradients=("x", "weight", "bias"),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("torch", plain(_torch)),
        Provider("torch.compile", compiled(_torch), needs_gpu=True),
        Provider("Liger", _liger, needs_gpu=True),
        Provider("flash-attn", _flash_attn, needs_gpu=True),
        Provider("apex", _apex, needs_gpu=True),
    ),
)
