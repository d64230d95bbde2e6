"""The GPT-3 language model, policy and reference: megatron's GPTModel read out as token
log-probs."""

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from models.attention import PackedSequences
from models.layers import block_spec
from models.sizes import GPTSize
from models.vocab_parallel import vocab_parallel_linear_logprobs

IGNORED = -100  # a label that asks for no log-prob


class GPT(GPTModel):
    """One pipeline chunk of a GPT with learned positions and tied embeddings."""

    def __init__(
        self,
        config: TransformerConfig,
        size: GPTSize,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage),
            vocab_size=size.padded_vocab_size,
            max_sequence_length=size.context_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=True,
            position_embedding_type="learned_absolute",
            vp_stage=vp_stage,
        )
        self.size = size

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        positions: Tensor,
        sequences: PackedSequences,
        *,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Run this chunk over a packed row of T tokens.

        tokens, positions: [T] int64. On the last stage, with mask [T] bool, returns fp32 log-probs
        [T] of each token given those before it in its sequence (position t belongs to token t,
        predicted from t-1; zero where mask is False), or [2, T] with the entropies below them. With
        rows [R] instead, returns this rank's vocabulary shard of the logits [R, V / tp] after those
        tokens. Earlier stages return hidden states.
        """
        hidden = self.embedding(tokens[None], positions[None]) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=sequences
        )
        if not self.post_process:
            return hidden
        hidden = hidden[:, 0]  # [T, hidden], or [T / tp, hidden] under sequence parallel
        weight = self.shared_embedding_or_output_weight()
        if rows is not None:
            if self.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            return hidden[rows].float() @ weight.float().T
        if mask is None:
            raise ValueError("the last stage needs mask (log-probs) or rows (logits)")
        # The state after token t-1 predicts token t: labels move one to the left, log-probs one to
        # the right.
        labels = tokens.masked_fill(~mask, IGNORED).roll(-1)
        labels[-1] = IGNORED
        logprobs, _ = vocab_parallel_linear_logprobs(
            hidden,
            weight,
            labels,
            group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            temperature=temperature,
            num_valid_vocab=self.size.vocab_size,
        )
        return shift_right(logprobs)


def shift_right(readings: Tensor) -> Tensor:
    """Move what was read at position t-1 to position t, the token it is about; position 0 gets 0.
    Last dim is [T]."""
    return F.pad(readings[..., :-1], (1, 0))
