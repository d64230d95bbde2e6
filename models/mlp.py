"""The two matrices of a layer's MLP, and what lies between them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP as MegatronMLP
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from kernels.gelu import gelu
from models.form import Activation, Form


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu,
    "gelu": F.gelu,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activate(x: Tensor, form: Form) -> Tensor:
    """Return what a form's MLP hands from the outputs of its first matrix to its second one.

    A gated one's columns alternate: the gate, and what it lets through. So any tensor-parallel
    rank's share of them is whole pairs, and a checkpoint can be cut anew.
    """
    activation = ACTIVATIONS[form.activation]
    if not form.is_gated:
        return activation(x)
    gate, through = x.unflatten(-1, (-1, 2)).unbind(-1)
    return activation(gate) * through


class MLP(MegatronMLP):
    """megatron's MLP of any form's activation."""

    def __init__(self, config: Any) -> None:
        """config: a LayerConfig; attention may have a bias where the MLP has none."""
        own = copy.copy(config)
        own.add_bias_linear = config.form.has_bias("mlp")
        super().__init__(
            own,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size * (2 if config.form.is_gated else 1),
        )

    def forward(self, hidden: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the output [T, 1, H] and the bias to add to it, if any."""
        inner, bias = self.linear_fc1(hidden)
        if self.config.bias_activation_fusion:
            inner = bias_gelu_impl(inner, bias)
        else:
            inner = activate(inner if bias is None else inner + bias, self.config.form)  # type: ignore[attr-defined]
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(inner)
        return output
