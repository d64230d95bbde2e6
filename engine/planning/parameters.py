"""How many parameters a rank holds of a network, and how many bytes of optimizer state: exact.

The shapes are those of models/gpt.py and models/scalar_gpt.py, the buffers those of megatron's
distributed optimizer; tests compare both with the real thing. Imports neither torch nor megatron.
"""

import functools
import math
from dataclasses import dataclass

from engine.settings.layout import ParallelLayout
from models.sizes import GPTSize, Kind

Buckets = list[tuple[int, list[tuple[int, int]]]]
"""A bucket each: (its elements with padding, (start, end) of every parameter in it)."""

PARAMETER_ALIGNMENT = 64  # elements: where megatron starts a parameter in a buffer
BUCKET_ALIGNMENT = 128  # elements: what a bucket's end is rounded up to, together with dp x cp
MASTER_BYTES = 4  # an element: fp32 masters
MOMENTS_BYTES = 8  # an element: Adam's two moments in fp32


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """The ranks of one pipeline stage of a network; every tp rank holds as much."""

    kind: Kind
    size: GPTSize
    layout: ParallelLayout
    pp_rank: int = 0
    dp: int = 1
    dtype: str = "bf16"

    @property
    def num_replicas(self) -> int:
        """Ranks that share the optimizer's state: dp x cp."""
        return self.dp * self.layout.cp

    def is_first(self, chunk: int) -> bool:
        """Return whether one of its model chunks begins the network."""
        return self.pp_rank == 0 and chunk == 0

    def is_last(self, chunk: int) -> bool:
        """Return whether one of its model chunks ends the network."""
        return self.pp_rank == self.layout.pp - 1 and chunk == self.layout.virtual_pp - 1


@functools.lru_cache(maxsize=4096)
def network_parameters(stage: PipelineStage) -> int:
    """Return the parameters that a rank of a stage holds.

    The last stage holds a copy of a tied embedding. Raises UserError where the layout cannot hold
    the size.
    """
    stage.layout.check(stage.size)
    return head_parameters(stage) + sum(
        elements
        for chunk in range(stage.layout.virtual_pp)
        for elements, _ in _chunk_parameters(stage, chunk)
    )


@functools.lru_cache(maxsize=4096)
def largest_parameter(stage: PipelineStage) -> int:
    """Return the elements of the largest parameter that a rank of a stage holds."""
    return max(
        elements
        for chunk in range(stage.layout.virtual_pp)
        for elements, _ in _chunk_parameters(stage, chunk)
    )


def optimizer_bytes(stage: PipelineStage) -> int:
    """Return the bytes of fp32 masters and Adam's two moments on the replica's rank that holds
    most; weights that are fp32 themselves are their own masters, and counted among them."""
    return (MASTER_BYTES + MOMENTS_BYTES) * owned_parameters(stage)


def head_parameters(stage: PipelineStage) -> int:
    """Return the parameters of a scalar network's head on a stage: fp32 whatever the dtype."""
    is_last = stage.pp_rank == stage.layout.pp - 1
    return stage.size.embedding_dim + 1 if stage.kind == "scalar" and is_last else 0


@functools.lru_cache(maxsize=4096)
def owned_parameters(stage: PipelineStage) -> int:
    """Return the parameters whose optimizer state the fullest of a stage's replicas keeps.

    Replicas own equal ranges of the padded buffers. Each allocates state for the parameters in
    its range.
    """
    stage.layout.check(stage.size)
    owned = [0] * stage.num_replicas
    for chunk in range(stage.layout.virtual_pp):
        for num_elements, spans in _buckets(stage, chunk):
            share = num_elements // stage.num_replicas
            for start, end in spans:
                for rank in range(start // share, (end - 1) // share + 1):
                    owned[rank] += min(end, (rank + 1) * share) - max(start, rank * share)
    return max(owned)


@functools.lru_cache(maxsize=4096)
def buffer_elements(stage: PipelineStage) -> int:
    """Return the elements of a trainable network's weight buffers, and of its gradient buffers:
    its parameters and their padding."""
    stage.layout.check(stage.size)
    return sum(
        num_elements
        for chunk in range(stage.layout.virtual_pp)
        for num_elements, _ in _buckets(stage, chunk)
    )


def _chunk_parameters(stage: PipelineStage, chunk: int) -> list[tuple[int, bool]]:
    """Return (elements, has a bucket of its own) of one model chunk's trunk, in the order of its
    modules."""
    size, layout = stage.size, stage.layout
    hidden, tp = size.hidden_size, layout.tp
    # Both ends of a pipeline hold the tied embedding, and split its state over replicas alike.
    has_head, form = stage.kind == "language", size.form
    is_shared = has_head and form.is_tied and layout.pp > 1
    vocabulary = (size.padded_vocab_size // tp * size.embedding_dim, is_shared)
    projection = [(size.embedding_width * hidden, False)] if size.embedding_width else []
    found: list[tuple[int, bool]] = []
    if stage.is_first(chunk):
        found.append(vocabulary)
        if form.rotary is None:
            found.append((size.context_length * hidden, False))
        found += projection
    num_layers = size.num_layers // (layout.pp * layout.virtual_pp)
    whole_layer = [(elements, False) for elements in layer_parameters(size, tp)]
    for _ in range(num_layers):
        found += whole_layer
    if stage.is_last(chunk):
        if not form.is_post_norm:
            found += [(elements, False) for elements in _norm_parameters(size, hidden)]
        found += projection
        if is_shared or (has_head and not form.is_tied):
            found.append(vocabulary)
    return found


def layer_parameters(size: GPTSize, tp: int) -> list[int]:
    """Return the elements of each parameter of a layer on a rank, in the order of its modules."""
    hidden, form = size.hidden_size, size.form

    # Column-parallel matrices split their bias too, row-parallel ones and norms do not.
    def column(out: int, *, has_bias: bool) -> list[int]:
        return [out // tp * hidden, *([out // tp] if has_bias else [])]

    def row(into: int, *, has_bias: bool) -> list[int]:
        return [hidden * (into // tp), *([hidden] if has_bias else [])]

    heads = 2 * _norm_parameters(size, size.head_dim) if form.norms_heads else []
    return [
        *_norm_parameters(size, hidden),
        *row(size.num_heads * size.head_dim, has_bias=form.has_bias("attention")),
        *column(size.qkv_width, has_bias=form.has_bias("qkv")),
        *heads,
        *_norm_parameters(size, hidden),
        *column(size.fc1_width, has_bias=form.has_bias("mlp")),
        *row(size.ffn_size, has_bias=form.has_bias("mlp")),
    ]


def _norm_parameters(size: GPTSize, width: int) -> list[int]:
    return [width] * (2 if size.form.norm == "layer" else 1)


def _buckets(stage: PipelineStage, chunk: int) -> Buckets:
    """Return the buckets of a chunk's buffer, as megatron's _ParamAndGradBuffer cuts them on GPUs.

    Parameters come in reverse order, aligned and padded. The first chunk of the first stage has
    several buckets where their reduction overlaps; other chunks have one. A shared embedding has
    its own. So has a scalar head beside 16-bit weights: it is fp32, and has a buffer of its own.
    """
    multiple = math.lcm(stage.num_replicas, BUCKET_ALIGNMENT)
    full = _full_bucket(stage, chunk)
    buckets: Buckets = []
    spans: list[tuple[int, int]] = []

    def close() -> None:
        nonlocal spans
        if spans:
            buckets.append((_round_up(spans[-1][1], multiple), spans))
        spans = []

    def add(elements: int) -> None:
        start = _round_up(spans[-1][1], PARAMETER_ALIGNMENT) if spans else 0
        spans.append((start, start + elements))

    trunk, head = _chunk_parameters(stage, chunk), []
    if stage.is_last(chunk) and stage.kind == "scalar":
        head = [(stage.size.embedding_dim, False), (1, False)]
    if stage.dtype == "fp32":
        trunk, head = [*trunk, *head], []
    for elements, is_alone in reversed(trunk):
        if is_alone:
            close()
        add(elements)
        if is_alone or spans[-1][1] >= full:
            close()
    close()
    for elements, _ in reversed(head):
        add(elements)
    close()
    return buckets


def _full_bucket(stage: PipelineStage, chunk: int) -> float:
    """The elements after which a bucket of a chunk is closed."""
    overlaps, _ = stage.layout.overlaps(gains=stage.num_replicas > 1)
    if not overlaps or not stage.is_first(chunk):
        return math.inf
    # megatron's own choice looks at dp, without cp.
    return stage.layout.bucket_elements or max(40_000_000, 1_000_000 * stage.dp)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
