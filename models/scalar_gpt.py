"""The same trunk with a head of one number, reward model and critic."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from models.layers import LayerConfig
from models.packed_sequences import PackedSequences
from models.readouts import Readings
from models.sizes import GPTSize
from models.trunk import build_trunk, run_trunk


class ScalarHead(MegatronModule):
    """A hidden state of width d -> one number. Weight std 1/sqrt(d+1), bias 0 (Stiennon et al.
    2020, appendix B.1).

    Its parameters are fp32 whatever the trunk's dtype: a bias of 11 in bf16 moves in steps of 0.06,
    which scores, values and the shift of a reward model would take over.
    """

    def __init__(self, config: TransformerConfig, width: int, group: ProcessGroup) -> None:
        """width: of what it reads. group: the tensor-parallel ranks."""
        super().__init__(config=config)
        self._group = group
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(1, width, device=device, dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))
        self.initialise()
        for parameter in self.parameters():
            # Under sequence parallel each tp rank reads its own tokens: megatron sums these
            # gradients over tp.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def initialise(self) -> None:
        """Draw the weight anew, and zero the bias."""
        torch.nn.init.normal_(self.weight, std=(self.weight.shape[1] + 1) ** -0.5)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return fp32 readings [T] of hidden [T, width], or of each rank's [T / tp, width] under
        sequence parallelism."""
        readings = (hidden.float() @ self.weight.T + self.bias)[:, 0]
        if not self.config.sequence_parallel:
            return readings
        return gather_from_sequence_parallel_region(
            readings, tensor_parallel_output_grad=False, group=self._group
        )


class ScalarGPT(LanguageModule):
    """One pipeline chunk of a GPT trunk whose last stage reads a number after every token."""

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
        self.share_embeddings_and_output_weights = False
        build_trunk(self, config, size)
        if post_process:
            self.scalar_head = ScalarHead(config, size.embedding_dim, self.pg_collection.tp)

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Take the hidden states of the previous stage (megatron's schedules call this)."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
        self, tokens: Tensor, positions: Tensor, sequences: PackedSequences, readout: Readings
    ) -> Tensor:
        """Run this chunk over a packed row of T tokens: the last stage returns fp32 readings [T],
        an earlier one its hidden states.

        tokens, positions: [T] int64. A reward model's score is the reading at the last response
        token. A critic's value of token t is the reading at t-1 (models.readouts.shift_right).
        """
        hidden = run_trunk(self, tokens, positions, sequences)
        if not self.post_process:
            return hidden
        return readout.read(self.scalar_head, hidden[:, 0], tokens, sequences)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Return the sharded tensors of this chunk, under the same names as the language model's
        trunk."""
        # LanguageModule's own version expects an output layer; there is only the scalar head here.
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
