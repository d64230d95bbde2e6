"""The language model, policy and reference: the trunk read out as token log-probs."""

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from torch import Tensor

from models.layers import LayerConfig
from models.packed_sequences import PackedSequences
from models.paged_attention import PagedSequences
from models.paged_forward import paged_embedding, paged_forward
from models.readouts import LanguageHead, LanguageReadout
from models.sizes import GPTSize
from models.trunk import build_trunk, read_by_head, run_trunk


class GPT(LanguageModule):
    """One pipeline chunk of a GPT, whose last stage reads the head."""

    def __init__(
        self,
        config: LayerConfig,
        size: GPTSize,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.size = size
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = size.form.is_tied
        build_trunk(self, config, size)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                size.embedding_dim,
                size.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and size.form.is_tied,
                tp_group=self.pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Take the hidden states of the previous stage (megatron's schedules call this)."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
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
        hidden = read_by_head(self, hidden)
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
