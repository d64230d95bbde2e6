"""The language model, policy and reference: megatron's GPTModel read out as token log-probs."""

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from models.attention import PackedSequences
from models.layers import LayerConfig, block_spec, order_positions, position_type
from models.paged_attention import PagedSequences
from models.paged_forward import paged_embedding, paged_forward
from models.readouts import LanguageHead, LanguageReadout
from models.sizes import GPTSize
from models.trunk import run_trunk


class GPT(GPTModel):
    """One pipeline chunk of a GPT."""

    def __init__(
        self,
        config: LayerConfig,
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
            share_embeddings_and_output_weights=size.form.is_tied,
            position_embedding_type=position_type(size.form),
            vp_stage=vp_stage,
        )
        self.size = size
        if pre_process:
            order_positions(self.embedding, config)

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        positions: Tensor,
        sequences: PackedSequences,
        readout: LanguageReadout,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk over a packed row of T tokens: the last stage returns what the readout
        says, an earlier one its hidden states.

        tokens, positions: [T] int64. Under context parallelism (sequences.share) each rank passes
        on the hidden states of the tokens it holds.
        """
        hidden = run_trunk(self, tokens, positions, sequences)
        if not self.post_process:
            return hidden
        head = self._head(self.config.sequence_parallel)
        return readout.read(head, hidden[:, 0], tokens, sequences)

    def forward_paged(
        self,
        tokens: Tensor,
        positions: Tensor,
        sequences: PagedSequences,
        readout: LanguageReadout,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk over a step of generation, as `forward` over a packed row.

        Hidden states [T, 1, H] are the same on all tensor-parallel ranks. No gradients, no hooks
        of the chunk.
        """
        group, hidden = self.pg_collection.tp, None
        if self.pre_process:
            hidden = paged_embedding(self.embedding, tokens, positions, group)
        hidden = paged_forward(self.decoder, hidden, positions, sequences, group)
        if not self.post_process:
            return hidden
        return readout.read(self._head(False), hidden[:, 0], tokens, sequences)

    def _head(self, sequence_parallel: bool) -> LanguageHead:
        is_tied = self.share_embeddings_and_output_weights
        return LanguageHead(
            weight=self.shared_embedding_or_output_weight()
            if is_tied
            else self.output_layer.weight,
            group=self.pg_collection.tp,
            sequence_parallel=sequence_parallel,
            num_valid_vocab=self.size.vocab_size,
        )
