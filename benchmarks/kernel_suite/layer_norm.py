"""Layer normalisation of x [T, H] in bf16."""

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
        "weight": 1 + 0.1 * torch.randn(width, **options),
        "bias": 0.1 * torch.randn(width, **options),
        "upstream": {"normed": torch.randn(shape, **options)},
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    leaves = [inputs[name].detach().double().requires_grad_() for name in LAYER_NORM.arguments]
    x, weight, bias = leaves
    normed = F.layer_norm(x, weight.shape, weight, bias, _EPS)
    gradients = torch.autograd.grad(weighted_sum({"normed": normed}, inputs["upstream"]), leaves)
    names = ("normed", *(f"{name}_grad" for name in LAYER_NORM.gradients))
    tensors = zip(names, (normed.detach(), *gradients), strict=True)
    return {name: Expected(tensor, 0.05, is_relative=True) for name, tensor in tensors}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Forward reads one and writes one; backward reads the input and a gradient, writes one.
    return Cost(num_bytes=inputs["x"].nbytes * (2 if mode == "forward" else 5))


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, eps=_EPS)


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, _EPS)


def _liger() -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, _EPS)


def _flash_attn() -> Any:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda x, weight, bias: layer_norm_fn(x, weight, bias, eps=_EPS)


def _apex() -> Any:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, weight.shape, _EPS)


LAYER_NORM = Operation(
    name="layer_norm",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("x", "weight", "bias"),
    outputs=("normed",),
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
