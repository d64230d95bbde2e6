"""The trunk that both networks share: embeddings and layers over a packed row of tokens."""

import copy
from typing import Any

from torch import Tensor

from models.attention import PackedSequences
from models.rotary import rotation_at


def run_trunk(chunk: Any, tokens: Tensor, positions: Tensor, sequences: PackedSequences) -> Tensor:
    """Return the hidden states [T, 1, H] behind a pipeline chunk's layers.

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
    return hidden
