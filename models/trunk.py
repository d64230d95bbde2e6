"""The trunk that both networks share: embeddings and layers over a packed row of tokens."""

import copy
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from models.embedding import Projection, build_embedding
from models.layers import LayerConfig, block_spec
from models.packed_sequences import PackedSequences
from models.rotary import rotation_at
from models.sizes import GPTSize


def build_trunk(chunk: Any, config: LayerConfig, size: GPTSize) -> None:
    """Give a pipeline chunk its embedding, its layers, and what projects their output to the
    embedding's width: of each what its stage has.

    chunk: a GPT or ScalarGPT that knows its stage and its groups.
    """
    if chunk.pre_process:
        chunk.embedding = build_embedding(config, size, chunk.pg_collection.tp)
    chunk.decoder = TransformerBlock(
        config=config,
        spec=block_spec(config, chunk.vp_stage),
        pre_process=chunk.pre_process,
        post_process=chunk.post_process,
        pg_collection=chunk.pg_collection,
        vp_stage=chunk.vp_stage,
    )
    if chunk.post_process and size.embedding_width:
        chunk.project_out = Projection(
            size.hidden_size, size.embedding_dim, config, reads_shares=config.sequence_parallel
        )


def run_trunk(chunk: Any, tokens: Tensor, positions: Tensor, sequences: PackedSequences) -> Tensor:
    """Return the hidden states [T, 1, H] behind a pipeline chunk's layers; of the last chunk what
    the head reads, in the embedding's width.

    chunk: a GPT or ScalarGPT; the first embeds, a later one goes on from what the stage before has
    sent. tokens, positions: [T] int64. Each rank computes the tokens that it holds: T is divided by
    cp under context parallelism, and by tp under sequence parallelism.
    """
    size, embedded = chunk.size, None
    tokens, positions = sequences.held(tokens), sequences.held(positions)
    if chunk.pre_process:
        embedded = chunk.embedding(tokens[None], positions[None])
    if size.form.rotary is not None:
        sequences = copy.copy(sequences)  # other networks read the same row
        sequences.rotation = rotation_at(
            positions, size.form.rotary, size.head_dim, chunk.config.params_dtype
        )
    hidden: Tensor = chunk.decoder(
        hidden_states=embedded, attention_mask=None, packed_seq_params=sequences
    )
    return read_by_head(chunk, hidden)


def read_by_head(chunk: Any, hidden: Tensor) -> Tensor:
    """Return what the head reads of the hidden states behind the last chunk's layers, [T, 1, width
    of the embedding]; those of another chunk as they are."""
    is_projected = chunk.size.embedding_width and chunk.post_process
    return chunk.project_out(hidden) if is_projected else hidden
