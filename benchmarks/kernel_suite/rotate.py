"""Rotary positions: queries and keys, columns of one product, turned by their tokens' angles, in
bf16."""

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
from kernels.rotate import rotate, rotate_reference


def _heads(tokens: int, heads: int, kv_heads: int, dim: int, turned: int) -> Size:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim, "turned": turned}


# Llama 3's 8B, a decoding step of it, Llama 2's 7B, and Pythia's 2.8B, a quarter of whose heads
# turns.
_SIZES = {
    "cuda": [
        _heads(8192, 32, 8, 128, 128),
        _heads(64, 32, 8, 128, 128),
        _heads(8192, 32, 32, 128, 128),
        _heads(8192, 32, 32, 80, 20),
    ],
    "cpu": [_heads(512, 9, 3, 64, 64), _heads(512, 32, 8, 128, 128)],
}


def _inputs(size: Size, device: torch.device) -> Inputs:
    tokens, kv_heads, dim = size["tokens"], size["kv_heads"], size["dim"]
    members = size["heads"] // kv_heads
    options: Any = {"dtype": torch.bfloat16, "device": device}
    angles = 10 * torch.randn(tokens, 1, size["turned"] // 2, device=device)
    return {
        "qkv": torch.randn(tokens, kv_heads, members + 2, dim, **options),
        "cosines": angles.cos().bfloat16(),
        "sines": angles.sin().bfloat16(),
        "upstream": {
            "query": torch.randn(tokens, kv_heads, members, dim, **options),
            "key": torch.randn(tokens, kv_heads, dim, **options),
        },
    }


def _exact(inputs: Inputs) -> dict[str, Expected]:
    qkv = inputs["qkv"].detach().double().requires_grad_()
    query, key = _torch(qkv, inputs["cosines"].double(), inputs["sines"].double())
    outputs = {"query": query, "key": key}
    (gradient,) = torch.autograd.grad(weighted_sum(outputs, inputs["upstream"]), qkv)
    tensors = {"query": query.detach(), "key": key.detach(), "qkv_grad": gradient}
    return {name: Expected(tensor, 0.02, is_relative=True) for name, tensor in tensors.items()}


def _cost(inputs: Inputs, mode: Mode) -> Cost:
    # Either way queries and keys are read and written. Backward torch also writes them, and zeros
    # for the values, into the gradient of the product: that is autograd's, and not counted.
    turned = sum(x.nbytes for x in inputs["upstream"].values())
    return Cost(num_bytes=turned * (2 if mode == "forward" else 4))


def _ours(qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(qkv[:, :, :-2], qkv[:, :, -2], cosines, sines)


def _torch(qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    query, key = (rotate_reference(x, cosines, sines) for x in (qkv[:, :, :-2], qkv[:, :, -2]))
    return query, key


ROTATE = Operation(
    name="rotate",
    sizes=_SIZES,
    inputs=_inputs,
    arguments=("qkv", "cosines", "sines"),
    outputs=("query", "key"),
    gradients=("qkv",),
    exact=_exact,
    cost=_cost,
    providers=(
        Provider("trident", plain(_ours)),
        Provider("torch", plain(_torch)),
        Provider("torch.compile", compiled(_torch), needs_gpu=True),
    ),
)
