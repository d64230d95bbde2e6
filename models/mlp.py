"""The two matrices of a layer's MLP, and what lies between them."""

import copy
from typing import Any

from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP as MegatronMLP
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from kernels.gated import ACTIVATIONS, gated
from models.form import Form


def activate(x: Tensor, form: Form, bias: Tensor | None = None) -> Tensor:
    """Return what a form's MLP hands from the outputs of its first matrix, and the bias to add to
    them, to its second one.

    A gated one's columns alternate: the gate, and what it lets through. So any tensor-parallel
    rank's share of them is whole pairs, and a checkpoint can be cut anew.
    """
    if form.is_gated:
        return gated(x, form.activation, bias)
    return ACTIVATIONS[form.activation](x if bias is None else x + bias)


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
            inner = activate(inner, self.config.form, bias)  # type: ignore[attr-defined]
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(inner)
        return output
