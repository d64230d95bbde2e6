"""How many parameters a rank holds of a network, and how many bytes of optimizer state: exact.

The shapes are those of models/gpt.py and models/scalar_gpt.py, the buffers those of megatron's
distributed optimizer; tests compare both with the real thing. Imports neither torch nor megatron.
"""

import functools
import math

from engine.settings.layout import ParallelLayout
from models.sizes import GPTSize, Kind

Buckets = list[tuple[int, list[tuple[int, int]]]]
"""A bucket each: (its elements with padding, (start, end) of every parameter in it)."""

PARAMETER_ALIGNMENT = 64  # elements: where megatron starts a parameter in a buffer
BUCKET_ALIGNMENT = 128  # elements: what a bucket's end is rounded up to, together with dp x cp
MASTER_BYTES = 4  # an element: fp32 masters
MOMENTS_BYTES = 8  # an element: Adam's two moments in fp32


@functools.lru_cache(maxsize=4096)
def network_parameters(kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int) -> int:
    """Return the parameters that a rank of pipeline stage pp_rank holds, every tp rank as many.

    The last stage holds a copy of the tied embedding. Raises UserError where the layout cannot
    hold the size.
    """
    layout.check(size)
    return head_parameters(kind, size, layout, pp_rank=pp_rank) + sum(
        elements
        for chunk in range(layout.virtual_pp)
        for elements, _ in _chunk_parameters(kind, size, layout, pp_rank, chunk)
    )


def largest_parameter(kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int) -> int:
    """Return the elements of the largest parameter that a rank of a stage holds."""
    return max(
        elements
        for chunk in range(layout.virtual_pp)
        for elements, _ in _chunk_parameters(kind, size, layout, pp_rank, chunk)
    )


def optimizer_bytes(  # noqa: PLR0913 - one rank, each coordinate named
    kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int, dp: int, dtype: str = "bf16"
) -> int:
    """Return the bytes of fp32 masters and Adam's two moments, on the replica's rank that holds
    most; fp32 weights, which are their own masters, are among them.

    dp x cp replicas own equal ranges of the padded buffers, and allocate state for the parameters
    in theirs.
    """
    return (MASTER_BYTES + MOMENTS_BYTES) * owned_parameters(
        kind, size, layout, pp_rank=pp_rank, dp=dp, dtype=dtype
    )


def head_parameters(kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int) -> int:
    """Return the parameters of a scalar network's head on a stage: fp32 whatever the dtype."""
    return size.hidden_size + 1 if kind == "scalar" and pp_rank == layout.pp - 1 else 0


@functools.lru_cache(maxsize=4096)
def owned_parameters(  # noqa: PLR0913
    kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int, dp: int, dtype: str = "bf16"
) -> int:
    """Return the parameters whose optimizer state the fullest of a stage's replicas keeps."""
    layout.check(size)
    num_replicas = dp * layout.cp
    owned = [0] * num_replicas
    for chunk in range(layout.virtual_pp):
        for num_elements, spans in _buckets(kind, size, layout, pp_rank, chunk, dp=dp, dtype=dtype):
            share = num_elements // num_replicas
            for start, end in spans:
                for rank in range(start // share, (end - 1) // share + 1):
                    owned[rank] += min(end, (rank + 1) * share) - max(start, rank * share)
    return max(owned)


@functools.lru_cache(maxsize=4096)
def buffer_elements(  # noqa: PLR0913
    kind: Kind, size: GPTSize, layout: ParallelLayout, *, pp_rank: int, dp: int, dtype: str = "bf16"
) -> int:
    """Return the elements of a trainable network's weight buffers, and of its gradient buffers:
    its parameters and their padding."""
    layout.check(size)
    return sum(
        num_elements
        for chunk in range(layout.virtual_pp)
        for num_elements, _ in _buckets(kind, size, layout, pp_rank, chunk, dp=dp, dtype=dtype)
    )


def _chunk_parameters(
    kind: Kind, size: GPTSize, layout: ParallelLayout, pp_rank: int, chunk: int
) -> list[tuple[int, bool]]:
    """Return (elements, has a bucket of its own) of one model chunk's trunk, in the order of its
    modules."""
    hidden, tp = size.hidden_size, layout.tp
    is_first = pp_rank == 0 and chunk == 0
    is_last = pp_rank == layout.pp - 1 and chunk == layout.virtual_pp - 1
    # Both ends of a pipeline hold the tied embedding, and split its state over replicas alike.
    is_shared = kind == "language" and layout.pp > 1
    found: list[tuple[int, bool]] = []
    if is_first:
        found.append((size.padded_vocab_size // tp * hidden, is_shared))
        found.append((size.context_length * hidden, False))
    norm = [hidden, hidden]
    # Column-parallel matrices split their bias too, row-parallel ones and norms do not.
    layer = [
        *norm,
        *(hidden * hidden // tp, hidden),  # attention's output
        *(3 * hidden // tp * hidden, 3 * hidden // tp),  # query, key and value
        *norm,
        *(4 * hidden // tp * hidden, 4 * hidden // tp),
        *(hidden * 4 * hidden // tp, hidden),
    ]
    num_layers = size.num_layers // (layout.pp * layout.virtual_pp)
    found += [(elements, False) for elements in layer * num_layers]
    if is_last:
        found += [(elements, False) for elements in norm]
        if kind == "language" and layout.pp > 1:
            found.append((size.padded_vocab_size // tp * hidden, is_shared))
    return found


def _buckets(  # noqa: PLR0913 - one chunk of one rank, each coordinate named
    kind: Kind,
    size: GPTSize,
    layout: ParallelLayout,
    pp_rank: int,
    chunk: int,
    *,
    dp: int,
    dtype: str,
) -> Buckets:
    """Return the buckets of a chunk's buffer: parameters in reverse order, aligned and padded as
    megatron's _ParamAndGradBuffer does on GPUs: several buckets on the first chunk of the first
    stage where their reduction overlaps, one elsewhere, one for a shared embedding, and one for a
    scalar head, which is fp32 and so has a buffer of its own beside 16-bit weights."""
    buckets: Buckets = []
    spans: list[tuple[int, int]] = []
    num_replicas = dp * layout.cp
    multiple = math.lcm(num_replicas, BUCKET_ALIGNMENT)
    overlaps, _ = layout.overlaps(gains=num_replicas > 1)
    full = math.inf
    if overlaps and pp_rank == 0 and chunk == 0:
        full = layout.bucket_elements or max(40_000_000, 1_000_000 * dp)  # megatron's: without cp

    def close() -> None:
        nonlocal spans
        if spans:
            buckets.append((_round_up(spans[-1][1], multiple), spans))
        spans = []

    parameters = _chunk_parameters(kind, size, layout, pp_rank, chunk)
    is_last = chunk == layout.virtual_pp - 1
    has_head = is_last and head_parameters(kind, size, layout, pp_rank=pp_rank) > 0
    head = [(size.hidden_size, False), (1, False)] if has_head else []
    if dtype == "fp32":
        parameters, head = [*parameters, *head], []
    for elements, is_alone in reversed(parameters):
        if is_alone:
            close()
        start = _round_up(spans[-1][1], PARAMETER_ALIGNMENT) if spans else 0
        spans.append((start, start + elements))
        if is_alone or spans[-1][1] >= full:
            close()
    close()
    for elements, _ in reversed(head):
        start = _round_up(spans[-1][1], PARAMETER_ALIGNMENT) if spans else 0
        spans.append((start, start + elements))
    close()
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
