"""The forward pass of generation through megatron's layers, without what training needs around it.

A decoding step is a few dozen small operations. megatron's modules wrap each in autograd functions,
hooks and checks that cost more than the operation. This reads the same weights through
the same norm and attention kernels, in the order of `models/layers.py`: embeddings, pre-norm
attention, pre-norm MLP with the tanh approximation of GELU, and the final norm.

Sequence parallelism is training's: it spares activations, of which generation has next to none, and
its weights are those of plain tensor parallelism. Here hidden states are the same on all
tensor-parallel ranks in either, summed twice a layer. Nothing asks the host or draws a random
number, so that a CUDA graph can hold all of it.
"""

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.gelu import gelu
from models.paged_attention import PagedSequences


def paged_embedding(
    embedding: Any, tokens: Tensor, positions: Tensor, group: ProcessGroup
) -> Tensor:
    """Return what megatron's LanguageModelEmbedding makes of tokens and positions [T], both int64:
    [T, 1, hidden size]. group: the tensor-parallel ranks, among which the vocabulary is cut."""
    words = embedding.word_embeddings
    if group.size() == 1:
        hidden = F.embedding(tokens, words.weight)
    else:
        number = tokens - words.vocab_start_index
        is_elsewhere = (number < 0) | (number >= len(words.weight))
        hidden = F.embedding(number.masked_fill_(is_elsewhere, 0), words.weight)
        hidden.masked_fill_(is_elsewhere[:, None], 0.0)
        dist.all_reduce(hidden, group=group)
    return hidden.add_(F.embedding(positions, embedding.position_embeddings.weight))[:, None]


def paged_forward(
    decoder: Any, hidden: Tensor | None, sequences: PagedSequences, group: ProcessGroup
) -> Tensor:
    """Return what megatron's TransformerBlock `decoder` makes of hidden: [T, 1, hidden size].

    hidden: None takes what the stage before has sent. group: the tensor-parallel ranks. Not for
    training: no gradients, no dropout.
    """
    hidden = (decoder.input_tensor if hidden is None else hidden)[:, 0]
    for layer in decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        qkv = _column_parallel(layer.input_layernorm(hidden), attention.linear_qkv)
        heads = attention.num_attention_heads_per_partition
        query, key, value = qkv.unflatten(1, (heads, -1)).chunk(3, dim=2)  # [T, heads / tp, dim]
        scale = attention.core_attention.softmax_scale
        out = sequences.attend(layer.layer_number, query, key, value, scale).flatten(1)
        hidden = _row_parallel(out, attention.linear_proj, group).add_(hidden)
        inner = _column_parallel(layer.pre_mlp_layernorm(hidden), mlp.linear_fc1)
        hidden = _row_parallel(gelu(inner), mlp.linear_fc2, group).add_(hidden)
    if decoder.final_layernorm is not None:
        hidden = decoder.final_layernorm(hidden)
    return hidden[:, None]


def _column_parallel(x: Tensor, linear: Any) -> Tensor:
    """[T, out / tp] this rank's columns of a linear layer of x [T, in]."""
    return F.linear(x, linear.weight, linear.bias)


def _row_parallel(x: Tensor, linear: Any, group: ProcessGroup) -> Tensor:
    """[T, out] from this rank's [T, in / tp], summed over the ranks."""
    if group.size() == 1:
        return F.linear(x, linear.weight, linear.bias)
    part = F.linear(x, linear.weight)
    dist.all_reduce(part, group=group)
    return part.add_(linear.bias)
