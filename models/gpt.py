"""The GPT-3 language model, policy and reference: megatron's GPTModel read out as token
log-probs."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kernels.linear_logprobs import ProportionalLoss, TokenLoss
from models.attention import PackedSequences
from models.context_parallel import join_readings
from models.layers import block_spec, order_positions
from models.paged_attention import PagedSequences
from models.paged_forward import paged_embedding, paged_forward
from models.sizes import GPTSize
from models.vocab_parallel import (
    vocab_parallel_linear_logprobs,
    vocab_parallel_linear_logprobs_loss,
)

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
        if pre_process:
            order_positions(self.embedding, config)

    def forward(  # type: ignore[override]  # noqa: PLR0913 - three ways to read the last stage
        self,
        tokens: Tensor,
        positions: Tensor,
        sequences: PackedSequences,
        *,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk over a packed row of T tokens; earlier stages return hidden states.

        tokens, positions: [T] int64. The last stage returns, with mask [T] bool, the fp32 log-probs
        [T] of each token given those before it in its sequence: position t belongs to token t,
        predicted from t-1, and is 0 where mask is False; targets [R], the positions of mask, spare
        the head the other tokens. With a token_loss(log-probs [n], their positions [n]) -> [n]
        besides, it returns (summed loss, log-probs without gradient), the head's gradients made in
        the same pass. With rows [R] instead of a mask it returns this rank's vocabulary shard of
        the logits [R, V / tp] after those tokens.

        Under context parallelism (sequences.share) each rank passes on the hidden states of the
        tokens it holds. Its summed loss is of those, and the log-probs [T] are of all.
        """
        share = sequences.share
        held = None if share is None else share.held(tokens.device)
        if isinstance(sequences, PagedSequences):
            hidden = self._generate(tokens, positions, sequences)
        else:
            embedded = None
            if self.pre_process:
                inputs = (tokens, positions) if held is None else (tokens[held], positions[held])
                embedded = self.embedding(inputs[0][None], inputs[1][None])
            hidden = self.decoder(
                hidden_states=embedded, attention_mask=None, packed_seq_params=sequences
            )
        if not self.post_process:
            return hidden
        hidden = hidden[:, 0]  # [T, hidden], or [T / tp, hidden] under sequence parallel
        weight = self.shared_embedding_or_output_weight()
        if rows is not None:
            if self.config.sequence_parallel and not isinstance(sequences, PagedSequences):
                hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
            return _logits(hidden[rows], weight)
        if mask is None:
            raise ValueError("the last stage needs mask (log-probs) or rows (logits)")
        # The state after token t-1 predicts token t: labels move one to the left, log-probs one to
        # the right.
        labels = tokens.masked_fill(~mask, IGNORED).roll(-1)
        labels[-1] = IGNORED
        arguments = {
            "group": self.pg_collection.tp,
            "sequence_parallel": self.config.sequence_parallel,
            "temperature": temperature,
            "num_valid_vocab": self.size.vocab_size,
            # How many of them a rank holds is not known on the host: it computes all of its rows.
            "row_index": None if targets is None or held is not None else targets - 1,
        }
        if held is not None:
            labels = labels[held]

        def at_all_tokens(logprobs: Tensor) -> Tensor:
            return shift_right(logprobs if share is None else join_readings(logprobs, share))

        if token_loss is None:
            logprobs, _ = vocab_parallel_linear_logprobs(hidden, weight, labels, **arguments)
            return at_all_tokens(logprobs)

        def at_tokens(values: Tensor, rows: Tensor) -> Tensor | tuple[Tensor, ...]:
            # The last row predicts nothing; its loss is discarded, yet it must look at some token.
            rows = rows if held is None else held[rows]
            return token_loss(values, (rows + 1).clamp(max=len(tokens) - 1))

        is_same_everywhere = isinstance(token_loss, ProportionalLoss)
        loss, logprobs = vocab_parallel_linear_logprobs_loss(
            hidden, weight, labels, token_loss if is_same_everywhere else at_tokens, **arguments
        )
        return loss, at_all_tokens(logprobs)

    def _generate(self, tokens: Tensor, positions: Tensor, sequences: PagedSequences) -> Tensor:
        """[T, 1, hidden] of generation, the same on all tensor-parallel ranks."""
        group, hidden = self.pg_collection.tp, None
        if self.pre_process:
            hidden = paged_embedding(self.embedding, tokens, positions, group)
        return paged_forward(self.decoder, hidden, sequences, group)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, V / tp] fp32 logits, summed in fp32 as the kernels of the log-probs do.

    On a GPU from the weights as they are: an fp32 copy of the head would cost every decoding step
    more than reading it.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def shift_right(readings: Tensor) -> Tensor:
    """Move what was read at position t-1 to position t, the token it is about; position 0 gets 0.
    Last dim is [T]."""
    return F.pad(readings[..., :-1], (1, 0))
