"""What tokens become before the layers, and how an embedding of another width than theirs is
projected: in before the first layer, out behind the last (OPT-350m, Zhang et al. 2022)."""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from models.layers import LayerConfig, order_positions, position_type
from models.sizes import GPTSize


class Projection(torch.nn.Linear):
    """A matrix without bias that every tensor-parallel rank holds whole: it is small beside a
    layer. Drawn as the layers' matrices are, with std 0.02 (our choice, and OPT's)."""

    def __init__(self, width: int, out: int, config: LayerConfig, *, reads_shares: bool) -> None:
        """reads_shares: each tensor-parallel rank reads its own tokens, as behind the layers under
        sequence parallelism; megatron then sums the gradient over them."""
        device = torch.cuda.current_device()
        super().__init__(width, out, bias=False, device=device, dtype=config.params_dtype)
        config.init_method(self.weight)
        self.weight.sequence_parallel = reads_shares  # type: ignore[attr-defined]


class ProjectedEmbedding(MegatronModule):
    """The tokens' embedding, projected to the layers' width, and then their positions."""

    def __init__(self, config: LayerConfig, size: GPTSize, group: ProcessGroup) -> None:
        """group: the tensor-parallel ranks, among which the vocabulary is cut."""
        super().__init__(config=config)
        self._group = group
        self.add_position_embedding = size.form.rotary is None
        self.word_embeddings = VocabParallelEmbedding(
            size.padded_vocab_size,
            size.embedding_dim,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=group,
        )
        if self.add_position_embedding:
            self.position_embeddings = torch.nn.Embedding(size.context_length, size.hidden_size)
            config.embedding_init_method(self.position_embeddings.weight)
        self.project_in = Projection(
            size.embedding_dim, size.hidden_size, config, reads_shares=False
        )
        self.embedding_dropout = torch.nn.Dropout(config.hidden_dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return [T, 1, H] of tokens and positions [1, T], or this rank's [T / tp, 1, H] under
        sequence parallelism.

        Tokens are dealt to the ranks behind the projection: all of them compute it, and have the
        whole of its gradient.
        """
        hidden = self.project_in(self.word_embeddings(tokens))
        if self.add_position_embedding:
            hidden = hidden + self.position_embeddings(positions)
        hidden = hidden.transpose(0, 1).contiguous()
        if not self.config.sequence_parallel:
            return self.embedding_dropout(hidden)  # type: ignore[no-any-return]
        # A copy: a view would keep the other ranks' tokens in memory.
        hidden = scatter_to_sequence_parallel_region(hidden, group=self._group).clone()
        with get_cuda_rng_tracker().fork():
            return self.embedding_dropout(hidden)  # type: ignore[no-any-return]


def build_embedding(
    config: LayerConfig, size: GPTSize, group: ProcessGroup
) -> LanguageModelEmbedding | ProjectedEmbedding:
    """Return what a first pipeline stage embeds tokens with; group: its tensor-parallel ranks."""
    embedding: LanguageModelEmbedding | ProjectedEmbedding
    if size.embedding_width:
        embedding = ProjectedEmbedding(config, size, group)
    else:
        embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=size.padded_vocab_size,
            max_sequence_length=size.context_length,
            position_embedding_type=position_type(size.form),
            tp_group=group,
        )
    order_positions(embedding, config)
    return embedding
