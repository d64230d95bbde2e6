"""What the ranks of a job hold, seen by building one of each kind on the meta device.

Ranks of one pipeline stage differ only in their place in its tensor-parallel group, and hold the
same number of parameters: the first and the last of each stage are built, those between them
follow. Nothing is allocated, so that a laptop sees a 175B model on a thousand GPUs.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.checkpoints.shards import Shard, shards_of
from engine.errors import UserError
from engine.planning.parameters import PipelineStage, network_parameters, optimizer_bytes
from engine.ranks.parallel import Parallel
from engine.ranks.start import pretended_rank
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import build_network
from engine.training.optimizer import Optimizer
from models.sizes import GPTSize, Kind

STATE_BYTES = 12  # an element: the fp32 master and Adam's two moments


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network of a job; roles of one shape and layout share it here."""

    roles: tuple[str, ...]
    kind: Kind
    size: GPTSize
    layout: ParallelLayout
    numerics: Numerics
    adam: AdamConfig | None
    """None where every role is frozen."""

    def __str__(self) -> str:
        return " and ".join(self.roles)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What one rank holds of a model."""

    tp_rank: int
    pp_rank: int
    num_parameters: int
    shards: list[Shard]
    """Its parts of the tensors of a checkpoint, in the order of its modules."""
    num_owned: list[int] = field(default_factory=list)
    """By replica: elements whose optimizer state the rank in this one's place there keeps."""

    def __str__(self) -> str:
        return f"pipeline stage {self.pp_rank}, tp rank {self.tp_rank}"


def build_ranks(models: list[Model], world_size: int) -> Iterator[tuple[Model, Rank]]:
    """Yield every distinct rank of every model; raises UserError where a layout does not fit."""
    for layout in dict.fromkeys(model.layout for model in models):
        for pp_rank, tp_rank in itertools.product(range(layout.pp), sorted({0, layout.tp - 1})):
            with pretended_rank(
                _as_on_gpus(layout, world_size),
                world_size=world_size,
                tp_rank=tp_rank,
                pp_rank=pp_rank,
            ) as parallel:
                for model in models:
                    if model.layout == layout:
                        yield model, _build(model, parallel)


def _as_on_gpus(layout: ParallelLayout, world_size: int) -> ParallelLayout:
    """Return the layout with gradients reduced as GPUs do where it leaves that open: the buckets
    depend on it. Weights are gathered at once, which the meta device can do."""
    reduce, _ = layout.overlaps(gains=layout.dp(world_size) * layout.cp > 1)
    return dataclasses.replace(layout, overlap_grad_reduce=reduce, overlap_param_gather=False)


def _build(model: Model, parallel: Parallel) -> Rank:
    network = build_network(model.kind, model.size, parallel, numerics=model.numerics)
    shards = shards_of(network)
    num_owned: list[int] = []
    if model.adam is not None:
        num_owned = Optimizer(network, model.adam, total_steps=1).num_owned_by_rank()
    return Rank(
        tp_rank=parallel.tp_rank,
        pp_rank=parallel.pp_rank,
        num_parameters=sum(p.numel() for m in network.modules for p in m.parameters()),
        shards=shards,
        num_owned=num_owned,
    )


def check_rank(model: Model, rank: Rank) -> None:
    """Raise UserError where a rank's parameters are not what layout and planner say."""
    tensors = expected_tensors(model.kind, model.size)
    for shard in rank.shards:
        if shard.name not in tensors:
            raise UserError(f"{model}: {rank} holds an unknown tensor {shard.name}")
        shape, split = tensors[shard.name]
        part = list(shape)
        if split is not None:
            part[split] //= model.layout.tp
        if shard.name.startswith("decoder.layers."):
            part[0] = 1  # a layer
        if (shard.global_shape, shard.shape) != (shape, tuple(part)):
            raise UserError(
                f"{model}: {rank} holds {shard.shape} of {shard.name} {shard.global_shape}; "
                f"the layout gives {tuple(part)} of {shape}"
            )
    # Replicas are counted where something is trained; the parameters do not depend on them.
    stage = PipelineStage(
        kind=model.kind,
        size=model.size,
        layout=model.layout,
        pp_rank=rank.pp_rank,
        dp=max(1, len(rank.num_owned) // model.layout.cp),
        dtype=model.numerics.dtype,
    )
    planned = network_parameters(stage)
    if planned != rank.num_parameters:
        raise UserError(
            f"{model}: {rank} holds {rank.num_parameters} parameters; the plan has {planned}"
        )
    if model.adam is None:
        return
    planned = optimizer_bytes(stage)
    held = STATE_BYTES * max(rank.num_owned)
    if planned != held:
        raise UserError(
            f"{model}: {rank} holds {held} bytes of optimizer state; the plan has {planned}"
        )


def check_checkpoint(model: Model, ranks: list[Rank]) -> None:
    """Raise UserError unless the ranks together write every element of every tensor exactly once,
    and read only what is written."""
    written: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {
        name: {} for name in expected_tensors(model.kind, model.size)
    }
    shards = [shard for rank in _with_ranks_between(model, ranks) for shard in rank.shards]
    for shard in shards:
        if shard.is_written:
            if shard.offset in written[shard.name]:
                raise UserError(
                    f"{model}: two ranks write {shard.name} from {shard.offset} to a checkpoint"
                )
            written[shard.name][shard.offset] = shard.shape
    for name, (shape, _) in expected_tensors(model.kind, model.size).items():
        # Parts of one shape on its grid, none twice and none outside: they cover what they sum to.
        parts = written[name]
        for offset, part in parts.items():
            bounds = zip(offset, part, shape, strict=True)
            if len(set(parts.values())) > 1 or any(o % p or o + p > s for o, p, s in bounds):
                raise UserError(f"{model}: {part} of {name} from {offset} is not on its grid")
        num_written = sum(math.prod(part) for part in parts.values())
        if num_written != math.prod(shape):
            raise UserError(
                f"{model}: the ranks write {num_written} of the {math.prod(shape)} elements "
                f"of {name} to a checkpoint"
            )
    for shard in shards:
        if shard.offset not in written[shard.name]:
            raise UserError(f"{model}: no rank writes {shard.name} from {shard.offset}")


def _with_ranks_between(model: Model, ranks: list[Rank]) -> Iterator[Rank]:
    """Yield the ranks, and those between the first and the last of each tensor-parallel group,
    whose offsets lie evenly between theirs."""
    yield from ranks
    last = model.layout.tp - 1
    ends = {(rank.pp_rank, rank.tp_rank): rank for rank in ranks}
    for pp_rank in range(model.layout.pp):
        for tp_rank in range(1, last):
            pairs = zip(ends[pp_rank, 0].shards, ends[pp_rank, last].shards, strict=True)
            yield Rank(
                tp_rank=tp_rank,
                pp_rank=pp_rank,
                num_parameters=ends[pp_rank, last].num_parameters,
                shards=[_between(a, b, tp_rank, last) for a, b in pairs],
            )


def _between(first: Shard, last: Shard, tp_rank: int, last_tp_rank: int) -> Shard:
    """Return tp_rank's part of the tensor that the first and the last tp rank hold parts of."""
    offsets = zip(first.offset, last.offset, strict=True)
    return Shard(
        name=last.name,
        global_shape=last.global_shape,
        offset=tuple(a + (b - a) * tp_rank // last_tp_rank for a, b in offsets),
        shape=last.shape,
        is_written=last.is_written,
    )


def expected_tensors(kind: Kind, size: GPTSize) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Return the tensors of a whole model: name to (shape, the dimension that tp splits).

    A tensor of every layer has the layers as its first dimension.
    """
    hidden, layers, form = size.hidden_size, size.num_layers, size.form
    Tensors = dict[str, tuple[tuple[int, ...], int | None]]

    def column(out: int, *, has_bias: bool) -> Tensors:
        bias: Tensors = {"bias": ((layers, out), 1)}
        return {"weight": ((layers, out, hidden), 1)} | (bias if has_bias else {})

    def row(into: int, *, has_bias: bool) -> Tensors:
        bias: Tensors = {"bias": ((layers, hidden), None)}
        return {"weight": ((layers, hidden, into), 2)} | (bias if has_bias else {})

    def norm(*shape: int) -> Tensors:
        names = ("weight", "bias") if form.norm == "layer" else ("weight",)
        return dict.fromkeys(names, (shape, None))

    layer = {
        "input_layernorm": norm(layers, hidden),
        "self_attention.linear_qkv": column(size.qkv_width, has_bias=form.has_bias("qkv")),
        "self_attention.linear_proj": row(
            size.num_heads * size.head_dim, has_bias=form.has_bias("attention")
        ),
        "pre_mlp_layernorm": norm(layers, hidden),
        "mlp.linear_fc1": column(size.fc1_width, has_bias=form.has_bias("mlp")),
        "mlp.linear_fc2": row(size.ffn_size, has_bias=form.has_bias("mlp")),
    }
    if form.norms_heads:
        layer["self_attention.q_layernorm"] = norm(layers, size.head_dim)
        layer["self_attention.k_layernorm"] = norm(layers, size.head_dim)
    tensors: dict[str, tuple[tuple[int, ...], int | None]] = {
        f"decoder.layers.{module}.{name}": tensor
        for module, parts in layer.items()
        for name, tensor in parts.items()
    }
    width = size.embedding_dim
    tensors["embedding.word_embeddings.weight"] = ((size.padded_vocab_size, width), 0)
    if form.rotary is None:
        tensors["embedding.position_embeddings.weight"] = ((size.context_length, hidden), None)
    if size.embedding_width:
        tensors["embedding.project_in.weight"] = ((hidden, width), None)
        tensors["project_out.weight"] = ((width, hidden), None)
    if not form.is_post_norm:
        for name, tensor in norm(hidden).items():
            tensors[f"decoder.final_layernorm.{name}"] = tensor
    if kind == "language" and not form.is_tied:
        tensors["output_layer.weight"] = ((size.padded_vocab_size, width), 0)
    if kind == "scalar":
        tensors["scalar_head.weight"] = ((1, width), None)
        tensors["scalar_head.bias"] = ((1,), None)
    return tensors
