"""Seconds that a pass over a network takes, by cause: arithmetic, links, memory, waiting.

    compute    FLOPs of the busiest pipeline stage over peak x the assumed share
    tp         all-reduces (or all-gathers and reduce-scatters) of a layer's tensor parallelism
    cp         all-gathers of a layer's keys and values, reduce-scatters of their gradients
    pipeline   messages between stages
    bubble     stages that wait while the pipeline fills and drains
    host       a device that waits for the next launches, or for a look of the host, in decoding

Imports neither torch nor megatron.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.planning.hardware import Cluster
from engine.planning.memory import GRADIENT_BYTES, PlannedNetwork
from engine.planning.workload import Batch, harmonic
from engine.settings.sampling import GPU_STEPS_PER_SYNC

Seconds = dict[str, float]
"""Cause to seconds."""


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What one row costs the busiest stage."""

    compute: float
    tp: float
    cp: float
    pipeline: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return self.compute + self.tp + self.cp + self.pipeline


def train_seconds(
    network: PlannedNetwork, cluster: Cluster, batches: Sequence[Batch], budget: int
) -> Seconds:
    """Return the seconds of the forward and backward passes of a step's objectives.

    A pipeline takes them in one pass or in several, whichever engine/training/passes.py takes.
    """
    rows = [_rows(network, batch, budget) for batch in batches]
    apart = add_seconds(
        [
            _pipelined(network, cluster, batch, count, tokens, trains=True)
            for batch, (count, tokens) in zip(batches, rows, strict=True)
        ]
    )
    if network.layout.pp == 1:
        return apart
    count, longest = sum(count for count, _ in rows), max(tokens for _, tokens in rows)
    joint = _pipelined(network, cluster, batches[-1], count, longest, trains=True)
    return min(apart, joint, key=lambda seconds: sum(seconds.values()))


def forward_seconds(
    network: PlannedNetwork, cluster: Cluster, batch: Batch, budget: int
) -> Seconds:
    """Return the seconds of a forward pass over a batch, as scoring does."""
    count, tokens = _rows(network, batch, budget)
    return _pipelined(network, cluster, batch, count, tokens, trains=False)


def step_seconds(
    network: PlannedNetwork,
    cluster: Cluster,
    batches: Sequence[Batch],
    budget: int,
    *,
    with_average: bool = False,
) -> Seconds:
    """Return the seconds of the optimizer step that follows train_seconds of these batches.

    Gradients are reduced and weights gathered, which may hide under the last row's backward and
    the next one's forward pass: what does not hide counts. The update is that of the fullest stage.
    """
    layout, replicas = network.layout, network.num_replicas
    stages = range(layout.pp)
    elements = max(network.buffer_elements(stage) for stage in stages)
    owned = max(network.owned_parameters(stage) for stage in stages)
    exposed = 0.0
    if replicas > 1:
        _, tokens = _rows(network, batches[-1], budget)
        a_row = _row_cost(network, cluster, batches[-1], tokens, trains=True).total
        bandwidth = cluster.link_bandwidth(layout.tp * replicas)
        overlaps_reduce, overlaps_gather = layout.overlaps(gains=True)
        for num_bytes, overlaps, share in (
            (GRADIENT_BYTES, overlaps_reduce, 2 / 3),  # a reduce-scatter
            (network.element_bytes, overlaps_gather, 1 / 3),  # an all-gather
        ):
            seconds = num_bytes * elements * (replicas - 1) / replicas / bandwidth
            hidden = share * a_row if overlaps else 0.0
            exposed += max(cluster.latency * math.log2(replicas), seconds - hidden)
    # Read the gradient, read and write master and moments, write the weight; the average besides.
    # Buffers are cleared once.
    touched = owned * (4 + 8 + 16 + network.element_bytes + (12 if with_average else 0))
    return {
        "gradients": exposed,
        "optimizer": (touched + GRADIENT_BYTES * elements) / cluster.memory_bandwidth,
    }


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a replica generates."""

    sequences: int
    """Responses."""
    slots: int
    """Decoded together, in all of the pipeline's groups."""
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean."""
    most_new_tokens: int
    """Longest response."""
    prefill_tokens: int = 1024
    """Prompt tokens that a step takes in."""
    steps_per_sync: int = GPU_STEPS_PER_SYNC
    """Decoding steps between two looks of the host, without pipeline."""
    uses_graphs: bool = True
    """Whether decoding is launched as CUDA graphs; steps that take prompts in never are."""

    def eager_steps(self, pp: int) -> float:
        """Return the steps of a group that take prompts in: the first fill of the slots, then one
        after every look of the host that finds a slot free, while there is a queue."""
        if not self.uses_graphs:
            return self.steps(pp)
        queued, slots = self.sequences / pp, min(self.slots, self.sequences) / pp
        stride = self.steps_per_sync if pp == 1 else 1
        finds = 1 - (1 - 1 / max(self.response_tokens, 1 + 1e-9)) ** (slots * stride)
        draining = (queued - slots) * self.response_tokens / slots
        first = slots * self.prompt_tokens / self.prefill_tokens
        return min(first + draining * finds / (stride + finds), self.steps(pp))

    def steps(self, pp: int) -> float:
        """Return the decoding steps of a group: the queue drains through the slots, then the
        longest of the last responses ends. Lengths as if geometric, so that those under way have
        the mean still to go."""
        queued, slots = self.sequences / pp, self.slots / pp
        slots = min(slots, queued)
        tail = min(self.response_tokens * harmonic(slots), self.most_new_tokens)
        return (queued - slots) * self.response_tokens / slots + tail


def decode_seconds(network: PlannedNetwork, cluster: Cluster, work: Generation) -> Seconds:
    """Return the seconds of a rollout. Every decoding step reads a stage's weights and its part of
    the cache; the stages of a pipeline work on one group of sequences each."""
    layout, size = network.layout, network.size
    steps = work.steps(layout.pp) * layout.pp  # of a stage
    layers = size.num_layers // layout.pp
    sequences = work.sequences / layout.pp
    active = sequences * work.response_tokens * layout.pp / steps  # a step's mean
    context = work.prompt_tokens + work.response_tokens / 2
    weights = max(network.weight_bytes(stage) for stage in range(layout.pp))
    read = weights + active * context * network.cache_bytes_a_token()
    matrices, attention = layer_flops(network, 2 * context)  # a new token sees all of its context
    flops = (layers * (matrices + attention) + head_flops(network)) / layout.tp
    flops += projection_flops(network)
    step = max(read / cluster.memory_bandwidth, active * flops / cluster.flops)
    links = 0.0
    if layout.tp > 1:
        message = active * size.hidden_size * network.element_bytes
        ring = 2 * (layout.tp - 1) / layout.tp * message / cluster.link_bandwidth(layout.tp)
        links = 2 * layers * (ring + cluster.latency)
    prefill = work.sequences * work.prompt_tokens
    hop = prefill_hops = 0.0
    if layout.pp > 1:  # hidden states are whole on every tensor-parallel rank
        token = size.hidden_size * network.element_bytes / cluster.link_bandwidth(cluster.num_gpus)
        hop = layout.virtual_pp * (active * token + cluster.latency)
        prefill_hops = layout.virtual_pp * prefill * token
    # Prompts go through all stages at once; only their last token meets the head.
    prompts = Batch(
        count=work.sequences * network.dp,
        mean_tokens=work.prompt_tokens,
        limit=size.context_length,
        span=work.prompt_tokens,
        target_share=1 / work.prompt_tokens,
    )
    taking_in = _row_cost(network, cluster, prompts, prefill, trains=False)
    return {
        "memory": steps * step,
        "tp": steps * links + taking_in.tp,
        "pipeline": steps * hop + prefill_hops,
        "compute": taking_in.compute,
        "host": _host_seconds(network, cluster, work, step + links + hop),
    }


def _host_seconds(
    network: PlannedNetwork, cluster: Cluster, work: Generation, step: float
) -> float:
    """Seconds in which the device waits for the host in a rollout of decoding steps that take it
    `step` seconds each: launches beside the device's work, looks between it."""
    pp, assumed = network.layout.pp, cluster.assumptions
    eager = work.eager_steps(pp) * pp
    replayed = work.steps(pp) * pp - eager
    layers = network.size.num_layers // pp
    launch = network.layout.virtual_pp * assumed.graph_launch_us * 1e-6
    look = assumed.look_us * 1e-6
    stride = work.steps_per_sync if pp == 1 else 1
    return eager * (look + max(0.0, layers * assumed.layer_launch_us * 1e-6 - step)) + replayed * (
        look / stride + max(0.0, launch - step)
    )


def move_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Return the seconds of moving bytes between a GPU and its host's pinned memory, one way."""
    return num_bytes / cluster.host_bandwidth


def refit_seconds(generator: PlannedNetwork, cluster: Cluster) -> float:
    """Return the seconds in which a rank receives its copy for generation, all of it from
    others."""
    bandwidth = cluster.link_bandwidth(cluster.num_gpus)
    return generator.weight_bytes(0) / bandwidth


def gather_seconds(network: PlannedNetwork, cluster: Cluster) -> float:
    """Return the seconds in which data-parallel ranks gather the fullest stage's weights."""
    layout, dp = network.layout, network.dp
    held = max(network.weight_bytes(stage) for stage in range(layout.pp))
    bandwidth = cluster.link_bandwidth(layout.tp * network.num_replicas)
    layers = network.size.num_layers // layout.pp
    return held * (dp - 1) / dp / bandwidth + layers * cluster.latency if dp > 1 else 0.0


def layer_flops(network: PlannedNetwork, span: float) -> tuple[float, float]:
    """Return the forward FLOPs a token of one layer: (of its matrices, of attention's)."""
    size = network.size
    heads = size.num_heads * size.head_dim
    matrices = size.hidden_size * (size.qkv_width + heads + size.fc1_width + size.ffn_size)
    # GPT-3: 2 x 12 h^2; scores and values of the span / 2 keys that a causal token sees on average.
    return 2.0 * matrices, 4.0 * heads * span / 2


def head_flops(network: PlannedNetwork) -> float:
    """Return the forward FLOPs a predicted token of the head."""
    if network.kind == "scalar":
        return 2.0 * network.size.embedding_dim
    return 2.0 * network.size.embedding_dim * network.size.padded_vocab_size


def projection_flops(network: PlannedNetwork) -> float:
    """Return the forward FLOPs a token, on every tensor-parallel rank of the stage that has most,
    of projecting an embedding of another width: in on the first stage, out on the last."""
    size = network.size
    return (2 if network.layout.pp == 1 else 1) * 2.0 * size.embedding_width * size.hidden_size


def _rows(network: PlannedNetwork, batch: Batch, budget: int) -> tuple[int, float]:
    """Rows of the fullest data-parallel rank and the tokens of each: a pipeline pads them to the
    longest."""
    layout = network.layout
    count, longest = batch.rows(network.dp, budget, layout.pp if layout.virtual_pp > 1 else 1)
    return count, longest if layout.pp > 1 else batch.share(network.dp) / count


def _pipelined(
    network: PlannedNetwork,
    cluster: Cluster,
    batch: Batch,
    rows: int,
    row_tokens: float,
    *,
    trains: bool,
) -> Seconds:
    """Rows of one length through the pipeline: m rows keep p stages with v chunks each busy, or
    idle, for the time of m + (p - 1) / v rows."""
    row = _row_cost(network, cluster, batch, row_tokens, trains=trains)
    idle = (network.layout.pp - 1) / network.layout.virtual_pp
    return {
        "compute": rows * row.compute,
        "tp": rows * row.tp,
        "cp": rows * row.cp,
        "pipeline": rows * row.pipeline,
        "bubble": idle * row.total,
    }


def _row_cost(
    network: PlannedNetwork, cluster: Cluster, batch: Batch, tokens: float, *, trains: bool
) -> RowCost:
    layout, size = network.layout, network.size
    layers = size.num_layers // layout.pp
    held_tokens = tokens / layout.cp
    matrices, attention = layer_flops(network, batch.span)
    recompute = network.numerics.recompute
    # Backward is twice forward; recomputation adds a forward of what it dropped.
    factor = 1 + (2 if trains else 0) + (1 if trains and recompute == "full" else 0)
    attention_factor = factor + (1 if trains and recompute == "selective" else 0)
    flops = layers * (matrices * factor + attention * attention_factor)
    # The last stage; ranks that share rows predict all tokens (models/gpt.py).
    target_share = batch.target_share if layout.cp == 1 else 1.0
    flops += head_flops(network) * target_share * (3 if trains else 1)
    flops += layout.tp * projection_flops(network) * (3 if trains else 1)
    row_bytes = held_tokens * size.hidden_size * network.element_bytes
    tp_seconds = 0.0
    if layout.tp > 1:
        # All-reduces a layer: two forward, two backward, two where it is computed again. Sequence
        # parallelism splits each into halves, and gathers the inputs of two matrices once more.
        passes = 2 + (2 + layout.sequence_parallel + 2 * (recompute == "full") if trains else 0)
        ring = 2 * (layout.tp - 1) / layout.tp * row_bytes / cluster.link_bandwidth(layout.tp)
        tp_seconds = layers * passes * (ring + cluster.latency)
    cp_seconds = 0.0
    if layout.cp > 1:
        # Keys and values of the whole row: once forward, once where attention is computed again,
        # and their gradients.
        passes = 1 + (1 + (recompute != "none") if trains else 0)
        others = 2 * (layout.cp - 1) * row_bytes / layout.tp
        bandwidth = cluster.link_bandwidth(layout.tp * layout.cp)
        cp_seconds = layers * passes * (others / bandwidth + cluster.latency)
    pipeline = 0.0
    if layout.pp > 1:
        message = row_bytes / (layout.tp if layout.sequence_parallel else 1)
        hops = layout.virtual_pp * (2 if trains else 1)
        between = cluster.link_bandwidth(cluster.num_gpus)
        pipeline = hops * (message / between + cluster.latency)
    return RowCost(
        compute=held_tokens * flops / layout.tp / cluster.flops,
        tp=tp_seconds,
        cp=cp_seconds,
        pipeline=pipeline,
    )


def add_seconds(parts: Sequence[Seconds]) -> Seconds:
    """Return the sums by cause."""
    total: Seconds = {}
    for part in parts:
        for cause, seconds in part.items():
            total[cause] = total.get(cause, 0.0) + seconds
    return total
