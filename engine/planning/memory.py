"""Bytes that one network takes on one rank, by what they are for.

Weights, gradients and optimizer state are exact (engine/planning/parameters.py). Activations are
counted tensor by tensor, as in Korthikanti et al. 2022, without the attention's scores, which flash
attention does not keep. Imports neither torch nor megatron.
"""

import dataclasses
import functools
from dataclasses import dataclass

from engine.planning.parameters import (
    MASTER_BYTES,
    MOMENTS_BYTES,
    PipelineStage,
    buffer_elements,
    head_parameters,
    largest_parameter,
    layer_parameters,
    network_parameters,
    owned_parameters,
)
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from models.sizes import GPTSize, Kind

GRADIENT_BYTES = 4  # an element: gradients add up and are reduced in fp32
HEAD_WORKSPACE = 448 * 2**20  # kernels/workspace.py: a chunk of logits in fp32,
HEAD_ROWS = 8192  # of so many rows at most
STAGING = 2  # times the bytes, at most: torch rounds pinned blocks up to powers of two, keeps them


@dataclass(frozen=True, kw_only=True)
class PlannedNetwork:
    """One network of a run: its size, and how the ranks share it."""

    kind: Kind
    size: GPTSize
    layout: ParallelLayout
    numerics: Numerics
    dp: int
    has_dropout: bool = False

    @property
    def num_replicas(self) -> int:
        """Copies of the network, dp x cp: they share its optimizer's state."""
        return self.dp * self.layout.cp

    def in_generation(self) -> "PlannedNetwork":
        """Return the network as it generates: ranks that share rows in training are replicas."""
        layout = dataclasses.replace(self.layout, cp=1)
        return dataclasses.replace(self, layout=layout, dp=self.num_replicas)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.numerics.dtype == "fp32" else 2

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, the padding of the vocabulary aside."""
        size = self.size
        if self.kind == "language":
            return size.num_parameters
        head = 0 if size.form.is_tied else size.vocab_size * size.embedding_dim
        return size.num_parameters - head + size.embedding_dim + 1

    @property
    def num_counted(self) -> int:
        """The N of 6 N a token: all parameters, as GPT-3's Table D.1 counts, since the embedding is
        the head too; without the embedding where it is not."""
        embedding = self.size.vocab_size * self.size.embedding_dim
        is_head = self.kind == "language" and self.size.form.is_tied
        return self.num_parameters - (0 if is_head else embedding)

    def weight_bytes(self, pp_rank: int) -> int:
        """Return the bytes of the weights on a stage, the padding of buffers (kilobytes) aside."""
        stage = self._stage(pp_rank)
        head = head_parameters(stage)
        trunk = network_parameters(stage) - head
        return self.element_bytes * trunk + 4 * head

    def gradient_bytes(self, pp_rank: int) -> int:
        """Return the bytes of the gradient buffers."""
        return GRADIENT_BYTES * self.buffer_elements(pp_rank)

    def master_bytes(self, pp_rank: int) -> int:
        """Return the bytes of the fp32 masters on the fullest rank; fp32 weights are their own."""
        return 0 if self.element_bytes == 4 else MASTER_BYTES * self.owned_parameters(pp_rank)

    def moment_bytes(self, pp_rank: int) -> int:
        """Return the bytes of Adam's two moments on the fullest rank."""
        return MOMENTS_BYTES * self.owned_parameters(pp_rank)

    def average_bytes(self, pp_rank: int) -> int:
        """Return the bytes of the fp32 running average of the weights on the fullest rank."""
        return MASTER_BYTES * self.owned_parameters(pp_rank)

    def saved_bytes(self, pp_rank: int, *, has_average: bool = False) -> int:
        """Return the bytes that the fullest rank writes of a trained network: its share of masters,
        moments and perhaps the average, all fp32, and of the weights. A resume reads as many."""
        state = MASTER_BYTES + MOMENTS_BYTES + (MASTER_BYTES if has_average else 0)
        weights = self.weight_bytes(pp_rank) // self.num_replicas
        return state * self.owned_parameters(pp_rank) + weights

    def checkpoint_host_bytes(self, pp_rank: int, *, has_average: bool = False) -> int:
        """Return the most host memory that a rank takes for checkpoints of a trained network.

        Saving copies what the rank writes to pinned memory. Loading fills tensors in their place,
        a stored piece at a time, which is a parameter in fp32 at most. The GPU needs no more for
        either: nothing is gathered.
        """
        saving = STAGING * self.saved_bytes(pp_rank, has_average=has_average)
        piece = largest_parameter(self._stage(pp_rank))
        return max(saving, MASTER_BYTES * piece)

    def buffer_elements(self, pp_rank: int) -> int:
        """Return the elements of a trained network's buffers on a stage."""
        return buffer_elements(self._stage(pp_rank))

    def owned_parameters(self, pp_rank: int) -> int:
        """Return the parameters whose optimizer state the fullest rank of a stage keeps."""
        return owned_parameters(self._stage(pp_rank))

    def _stage(self, pp_rank: int) -> PipelineStage:
        return self._stages[pp_rank]

    @functools.cached_property
    def _stages(self) -> list[PipelineStage]:
        return [
            PipelineStage(
                kind=self.kind,
                size=self.size,
                layout=self.layout,
                pp_rank=pp_rank,
                dp=self.dp,
                dtype=self.numerics.dtype,
            )
            for pp_rank in range(self.layout.pp)
        ]

    def activation_bytes(
        self, pp_rank: int, rows: int, row_tokens: float, copied_keys: float = 0.0
    ) -> int:
        """Return the bytes kept for the backward pass of `rows` rows in the pipeline, at the most
        that a stage has in flight; copied_keys: of a token, see workload.Batch."""
        layout, recompute = self.layout, self.numerics.recompute
        chunk_layers = self.size.num_layers // (layout.pp * layout.virtual_pp)
        in_flight = _chunks_in_flight(layout, pp_rank, rows)
        whole, shared = self._layer_bytes_a_token(), self._shared_bytes_a_token(copied_keys)
        if recompute == "full":
            # The input of every layer, and all of the one that is being computed again.
            kept = self._sequence_share(self.element_bytes * self.size.hidden_size)
            a_token = in_flight * chunk_layers * kept + whole + shared
        elif recompute == "selective":  # attention again, and with it what it gathers
            a_token = in_flight * chunk_layers * whole + shared
        else:
            a_token = in_flight * chunk_layers * (whole + shared)
        # The first stage holds a row of every embedding that its chunks have in flight.
        a_token += self._projection_bytes_a_token(pp_rank, in_flight / layout.virtual_pp)
        return round(a_token * row_tokens / layout.cp)

    def workspace_bytes(
        self, pp_rank: int, row_tokens: float, copied_keys: float = 0.0, *, trains: bool
    ) -> int:
        """Return an estimate of what comes and goes within a layer and in the head; copied_keys: of
        a token, see workload.Batch."""
        size, tp, cp, width = self.size, self.layout.tp, self.layout.cp, self.element_bytes
        hidden, held_tokens = size.hidden_size, row_tokens / cp
        # Gathered input, the MLP's two wide tensors, the layer's output and their gradients.
        wide = (size.fc1_width + size.ffn_size) / tp
        a_token = width * (4 * hidden + wide) * (2 if trains else 1)
        keys = size.num_kv_heads * size.head_dim
        # Of copied keys and values the gradients, where there are more of them than of the MLP's.
        copied = 2 * keys * copied_keys / tp if trains else 0
        total = max(a_token, width * (4 * hidden + copied)) * held_tokens
        if cp > 1:
            # The row's keys and values as they arrive and in their order; the gradients of both.
            total += width * keys * 4 / tp * (2 if trains else 1) * row_tokens
        if trains and self.numerics.gradient_accumulation_fusion is False:
            # The widest matrix's gradient, before it adds.
            total += max(size.fc1_width, size.qkv_width) * hidden / tp * width
        columns = size.padded_vocab_size / tp
        if pp_rank == self.layout.pp - 1 and self.kind == "language":
            logits = min(HEAD_WORKSPACE, 4 * min(HEAD_ROWS, held_tokens) * columns)
            total += logits + 3 * width * size.embedding_dim * held_tokens
            total += self._head_gradient_bytes() if trains else 0
        if pp_rank == 0 and trains:  # the embedding's gradient, before it adds, after the layers'
            total = max(total, width * size.embedding_dim * columns)
        return round(total)

    def _head_gradient_bytes(self) -> float:
        """What the head holds of its weight's gradient from the forward to the backward pass.

        It makes the gradient in fp32 in one pass (kernels/linear_logprobs.py). In fp16 it takes
        two passes, which add to the buffer at once. A last stage whose weight is a copy of a tied
        embedding holds zeros besides: megatron's hook wants them (models/vocab_parallel.py).
        """
        elements = self.size.embedding_dim * self.size.padded_vocab_size / self.layout.tp
        one_pass = 0 if self.numerics.dtype == "fp16" else 4 * elements
        is_copy = self.layout.pp > 1 and self.size.form.is_tied
        return one_pass + (self.element_bytes * elements if is_copy else 0)

    def layer_weight_bytes(self) -> int:
        """Return the bytes of one layer's weights on a rank."""
        return self.element_bytes * sum(layer_parameters(self.size, self.layout.tp))

    def end_bytes(self, pp_rank: int) -> int:
        """Return the bytes of a stage's weights outside of its layers: embeddings, norm, head."""
        layers = self.size.num_layers // self.layout.pp
        return self.weight_bytes(pp_rank) - layers * self.layer_weight_bytes()

    def cache_bytes_a_token(self) -> int:
        """Return the bytes of the keys and values of one token on a rank."""
        layers = self.size.num_layers // self.layout.pp
        heads = self.size.num_kv_heads // self.layout.tp
        return 2 * layers * heads * self.size.head_dim * self.element_bytes

    def _layer_bytes_a_token(self) -> float:
        """What a layer keeps of a token: inputs of both norms and of both column-parallel matrices;
        query, key, value and attention's output; of the MLP what goes in and out of the activation.
        GPT-3 with 2 bytes a number and dropout: 10 h + 24 h / tp (Korthikanti et al. 2022, eq. 2).

        Parallel branches share the input of their norms. A gated MLP keeps the activation by
        itself, too. Attention keeps queries and keys that were changed since the matrix made them.
        A rotation is a part of what it computes again.
        """
        size, width, form = self.size, self.element_bytes, self.size.form
        hidden = size.hidden_size
        inputs = 3 if form.is_parallel else 4
        outside = inputs * width * hidden + (2 * hidden if self.has_dropout else 0)  # masks: a byte
        kept = size.qkv_width + size.num_heads * size.head_dim
        kept += size.fc1_width + size.ffn_size * (2 if form.is_gated else 1)
        turns = form.rotary is not None and self.numerics.recompute != "selective"
        if form.norms_heads or turns:
            kept += (size.num_heads + size.num_kv_heads) * size.head_dim
        # Queries that share a head of keys are copied out of the matrix's output.
        if size.num_kv_heads < size.num_heads and not (turns and not form.norms_heads):
            kept += size.num_heads * size.head_dim
        return self._sequence_share(outside) + width * kept / self.layout.tp

    def _projection_bytes_a_token(self, pp_rank: int, rows: float) -> float:
        """What the projections of an embedding of another width keep, which is what they read:
        all tensor-parallel ranks the same on the way in, behind the layers each its own."""
        size, kept = self.size, 0.0
        if size.embedding_width and pp_rank == 0:
            kept += rows * self.element_bytes * size.embedding_width
        if size.embedding_width and pp_rank == self.layout.pp - 1:
            kept += self._sequence_share(self.element_bytes * size.hidden_size)
        return kept

    def _shared_bytes_a_token(self, copied_keys: float) -> float:
        """What a layer keeps besides of each token that a rank holds, where ranks share rows, or
        sequences their beginning: so many copies of keys and values a token.

        The keys and values of all these ranks, and the attention's output once more: attention
        keeps it in two pieces, the projection after it in one. Both at once is the most there is.
        """
        cp, size = self.layout.cp, self.size
        gathered = 2 * cp * size.num_kv_heads + size.num_heads if cp > 1 else 0
        heads = gathered + 2 * copied_keys * size.num_kv_heads
        return heads * size.head_dim * self.element_bytes / self.layout.tp

    def _sequence_share(self, num_bytes: float) -> float:
        """Bytes of what sequence parallelism, where it is on, splits over tp."""
        return num_bytes / (self.layout.tp if self.layout.sequence_parallel else 1)


def _chunks_in_flight(layout: ParallelLayout, pp_rank: int, rows: int) -> int:
    """Chunks x rows whose activations a stage holds at once in megatron's schedules."""
    if layout.virtual_pp == 1:
        return min(layout.pp - pp_rank, rows)
    warmup = 2 * (layout.pp - pp_rank - 1) + (layout.virtual_pp - 1) * layout.pp
    return min(warmup + 1, rows * layout.virtual_pp)
