"""The forward pass of generation through megatron's layers, without what training needs around it.

A decoding step is a few dozen small operations, and megatron's modules wrap each in autograd
functions, hooks and checks that cost more than the operation. This reads the same weights through
the same norm and attention kernels, in the order of `models/layers.py`: pre-norm attention,
pre-norm MLP with the tanh approximation of GELU, and the final norm.
"""

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from models.paged_attention import PagedSequences


def paged_forward(
    decoder: Any, hidden: Tensor | None, sequences: PagedSequences, group: ProcessGroup
) -> Tensor:
    """Return what megatron's TransformerBlock `decoder` makes of hidden: [T, 1, hidden size].

    hidden: None takes what the stage before has sent. Under sequence parallel both have T / tp
    rows. group: the tensor-parallel ranks. Not for training: no gradients, no dropout.
    """
    hidden = (decoder.input_tensor if hidden is None else hidden)[:, 0]
    scatters = decoder.config.sequence_parallel
    for layer in decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        qkv = _column(layer.input_layernorm(hidden), attention.linear_qkv, group, scatters)
        heads = attention.num_attention_heads_per_partition
        query, key, value = qkv.unflatten(1, (heads, -1)).chunk(3, dim=2)  # [T, heads / tp, dim]
        scale = attention.core_attention.softmax_scale
        out = sequences.attend(layer.layer_number, query, key, value, scale).flatten(1)
        hidden = _row(out, attention.linear_proj, group, scatters).add_(hidden)
        inner = _column(layer.pre_mlp_layernorm(hidden), mlp.linear_fc1, group, scatters)
        inner = F.gelu(inner, approximate="tanh")
        hidden = _row(inner, mlp.linear_fc2, group, scatters).add_(hidden)
    if decoder.final_layernorm is not None:
        hidden = decoder.final_layernorm(hidden)
    return hidden[:, None]


def _column(x: Tensor, linear: Any, group: ProcessGroup, is_scattered: bool) -> Tensor:
    """[T, out / tp] this rank's columns of a linear layer; x is [T, in], or [T / tp, in]."""
    if is_scattered:
        rows = x.new_empty(group.size() * len(x), x.shape[1])
        dist.all_gather_into_tensor(rows, x, group=group)
        x = rows
    return F.linear(x, linear.weight, linear.bias)


def _row(x: Tensor, linear: Any, group: ProcessGroup, scatters: bool) -> Tensor:
    """[T, out] from this rank's [T, in / tp]: summed over the ranks, or [T / tp, out] of it."""
    if group.size() == 1:
        return F.linear(x, linear.weight, linear.bias)
    part = F.linear(x, linear.weight)
    if scatters:
        summed = part.new_empty(len(part) // group.size(), part.shape[1])
        dist.reduce_scatter_tensor(summed, part, group=group)
        return summed.add_(linear.bias)
    dist.all_reduce(part, group=group)
    return part.add_(linear.bias)
