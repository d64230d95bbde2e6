"""The forward pass of generation through megatron's layers, without what training needs around it.

A decoding step is a few dozen small operations. megatron's modules wrap each in autograd functions,
hooks and checks that cost more than the operation. This reads the same weights through
the same norm and attention kernels, in the order of `models/layers.py`.

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

from models.embedding import ProjectedEmbedding
from models.mlp import activate
from models.paged_attention import PagedSequences
from models.rotary import Rotation, rotation_at


def paged_embedding(
    embedding: Any, tokens: Tensor, positions: Tensor, group: ProcessGroup
) -> Tensor:
    """Return what an embedding (models/embedding.py) makes of tokens and positions [T], both int64:
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
    if isinstance(embedding, ProjectedEmbedding):
        hidden = embedding.project_in(hidden)
    if embedding.add_position_embedding:
        hidden.add_(F.embedding(positions, embedding.position_embeddings.weight))
    return hidden[:, None]


def paged_forward(
    decoder: Any,
    hidden: Tensor | None,
    positions: Tensor,
    sequences: PagedSequences,
    group: ProcessGroup,
) -> Tensor:
    """Return what megatron's TransformerBlock `decoder` makes of hidden: [T, 1, hidden size].

    positions: [T] int64. hidden: None takes what the stage before has sent. group: the
    tensor-parallel ranks. Not for training: no gradients, no dropout.
    """
    hidden = (decoder.input_tensor if hidden is None else hidden)[:, 0]
    config, rotation = decoder.config, None
    if config.form.rotary is not None:
        rotation = rotation_at(
            positions, config.form.rotary, config.kv_channels, config.params_dtype
        )
    for layer in decoder.layers:
        hidden = _layer(layer, hidden, rotation, sequences, group)
    if decoder.final_layernorm is not None:
        hidden = decoder.final_layernorm(hidden)
    return hidden[:, None]


def _layer(
    layer: Any,
    hidden: Tensor,
    rotation: Rotation | None,
    sequences: PagedSequences,
    group: ProcessGroup,
) -> Tensor:
    form, mlp = layer.config.form, layer.mlp
    is_after = form.is_post_norm
    read = hidden if is_after else layer.input_layernorm(hidden)
    attended = _attention(layer, read, rotation, sequences, group).add_(hidden)
    if is_after:
        attended = layer.input_layernorm(attended)
    read = hidden if form.is_parallel else attended
    if not is_after:
        read = layer.pre_mlp_layernorm(read)
    inner = _column_parallel(read, mlp.linear_fc1)
    out = _row_parallel(activate(inner, form), mlp.linear_fc2, group).add_(attended)
    return layer.pre_mlp_layernorm(out) if is_after else out


def _attention(
    layer: Any,
    hidden: Tensor,
    rotation: Rotation | None,
    sequences: PagedSequences,
    group: ProcessGroup,
) -> Tensor:
    attention = layer.self_attention
    qkv = _column_parallel(hidden, attention.linear_qkv)
    # Of each head of keys: its heads of queries, the key and the value.
    qkv = qkv.unflatten(1, (attention.num_query_groups_per_partition, -1, layer.config.kv_channels))
    query, key, value = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    if rotation is not None:
        query, key = rotation.turn(query, key)  # read where they lie
    query, core = query.flatten(1, 2), attention.core_attention
    out = sequences.attend(layer.layer_number, query, key, value, core.softmax_scale, core.window)
    return _row_parallel(out.flatten(1), attention.linear_proj, group)


def _column_parallel(x: Tensor, linear: Any) -> Tensor:
    """[T, out / tp] this rank's columns of a linear layer of x [T, in]."""
    return F.linear(x, linear.weight, linear.bias)


def _row_parallel(x: Tensor, linear: Any, group: ProcessGroup) -> Tensor:
    """[T, out] from this rank's [T, in / tp], summed over the ranks."""
    if group.size() == 1:
        return F.linear(x, linear.weight, linear.bias)
    part = F.linear(x, linear.weight)
    dist.all_reduce(part, group=group)
    return part if linear.bias is None else part.add_(linear.bias)
