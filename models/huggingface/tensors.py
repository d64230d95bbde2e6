"""Hugging Face's tensors and the parameters of our networks: names, shapes and splits, both
ways, by the tables of families.py.

"Theirs" is a tensor of a folder, whole; "ours" is a parameter of models.gpt.GPT or ScalarGPT as
megatron-core lays it out, of which a tensor-parallel rank holds a shard. Besides the names, four
things differ. Conv1D's matrices are [in, out] where a linear layer has [out, in]. Their queries,
keys and values follow one another, in one tensor or in three. Ours are ordered by key-value head,
each with the heads of queries that read it: a block of rows is whole heads. Of a gated MLP they
have two matrices; our rows alternate, so that a block is a gated MLP too. Our vocabulary is padded,
with rows of zeros that are masked everywhere.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.form import Form
from models.huggingface.families import Family
from models.sizes import GPTSize, Kind

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# What wrappers put into names: torch.compile, DistributedDataParallel, FSDP, TRL's value head.
_WRAPPERS = {
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "pretrained_model",
}

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_POSITIONS = "embedding.position_embeddings"
_PROJECT_IN, _PROJECT_OUT = "embedding.project_in", "project_out"
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
_SCORE = "scalar_head"
SCORE, SCORE_BIAS = f"{_SCORE}.weight", f"{_SCORE}.bias"  # theirs has no bias
PROJECT_OUT = f"{_PROJECT_OUT}.weight"
_HEAD_OF: dict[Kind, str] = {"language": "output_layer", "scalar": _SCORE}


@dataclass(frozen=True)
class _Ours:
    """A module of ours: the shape of its weight, as fields of a size, and how ranks split it."""

    weight: tuple[str, ...]
    axis: int | None  # of the weight, which tensor parallelism splits; None: every rank holds all

    @property
    def is_norm(self) -> bool:
        return len(self.weight) == 1


_IN_LAYER = {
    "input_layernorm": _Ours(("hidden_size",), None),
    _QKV: _Ours(("qkv_width", "hidden_size"), 0),
    "self_attention.q_layernorm": _Ours(("head_dim",), None),
    "self_attention.k_layernorm": _Ours(("head_dim",), None),
    "self_attention.linear_proj": _Ours(("hidden_size", "query_width"), 1),
    "pre_mlp_layernorm": _Ours(("hidden_size",), None),
    _FC1: _Ours(("fc1_width", "hidden_size"), 0),
    "mlp.linear_fc2": _Ours(("hidden_size", "ffn_size"), 1),
}
_OUTSIDE = {
    "embedding.word_embeddings": _Ours(("vocab_size", "embedding_dim"), 0),
    _POSITIONS: _Ours(("context_length", "hidden_size"), None),
    _PROJECT_IN: _Ours(("hidden_size", "embedding_dim"), None),
    "decoder.final_layernorm": _Ours(("hidden_size",), None),
    _PROJECT_OUT: _Ours(("embedding_dim", "hidden_size"), None),
    "output_layer": _Ours(("vocab_size", "embedding_dim"), 0),
    _SCORE: _Ours(("score_width", "embedding_dim"), None),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Rule:
    """How tensors of theirs make one parameter of ours."""

    stored: tuple[Stored, ...]
    axis: int | None  # of ours, which tensor parallelism splits
    is_transposed: bool
    is_padded: bool  # has the vocabulary's padding
    first_row: int  # of theirs
    num_groups: int  # of rows, of each of which every part has a share; 0: the rows are as ours
    shares: tuple[int, ...]  # rows of a group in each part


def parameter_names(size: GPTSize, kind: Kind = "language") -> Iterator[str]:
    """Yield the names of our parameters that are made of theirs, layers counted from 0.

    A tied head is none, and neither is the bias of a scalar network's head.
    """
    form = size.form
    other_heads = {head for its_kind, head in _HEAD_OF.items() if its_kind != kind}
    for module in _OUTSIDE:
        if module in other_heads or not _is_there(module, size):
            continue
        yield from (f"{module}.{part}" for part in _kinds(module, _OUTSIDE[module], form))
    for layer in range(size.num_layers):
        for module, ours in _IN_LAYER.items():
            if _is_there(module, size):
                for part in _kinds(module, ours, form):
                    yield f"decoder.layers.{layer}.{module}.{part}"


def stored_tensors(name: str, family: Family, size: GPTSize) -> tuple[Stored, ...]:
    """Return the tensors of theirs that our parameter `name` is made of; raises ValueError.

    The head of a model whose head is tied is made of the embedding.
    """
    return _rule(name, family, size).stored


def last_norm_bias(size: GPTSize) -> str | None:
    """Return the name of our parameter that is added to the last layer's output, which the head
    reads or `project_out` takes to it; None: no norm is there, or its form has no bias."""
    if size.form.norm != "layer":
        return None
    if size.form.is_post_norm:
        return f"decoder.layers.{size.num_layers - 1}.pre_mlp_layernorm.bias"
    return "decoder.final_layernorm.bias"


def canonical_name(stored: str, family: Family) -> str | None:
    """Return the family's name of a tensor in a file; None for a constant that is no weight.

    What wrappers put into it goes. Files of the bare trunk (GPT2Model, GPT-2's own on the hub)
    leave the first parts of it out.
    """
    segments = stored.split(".")
    name = ".".join(part for part in segments if part not in _WRAPPERS)
    if any(name == f"{head}.weight" for head in family.head):
        return f"{family.head[0]}.weight"
    if name == f"{family.score}.weight":
        return name
    parts = family.trunk.split(".")[:-1]
    begins = [".".join([*parts[:n], name]) for n in range(len(parts) + 1)]
    name = next((begin for begin in begins if begin.startswith(family.trunk)), name)
    return None if re.fullmatch(re.escape(family.trunk) + f"({family.constants})", name) else name


def to_shard(
    name: str, parts: Sequence[Tensor], family: Family, size: GPTSize, *, tp: int, tp_rank: int
) -> Tensor:
    """Return what rank tp_rank of tp holds of our parameter `name`, from all of stored_tensors.

    Of the parts no more is read or copied than that.
    """
    rule = _rule(name, family, size)
    views = [part[rule.first_row :] for part in parts]
    if rule.is_transposed:
        views = [view.T for view in views]
    if rule.num_groups:
        if rule.num_groups % tp:
            raise ValueError(f"{name}: {rule.num_groups} groups of rows over {tp} ranks")
        mine = rule.num_groups // tp
        blocks = [
            block.unflatten(0, (rule.num_groups, -1))[tp_rank * mine : (tp_rank + 1) * mine]
            for block in _split(views, rule)
        ]
        return torch.cat(blocks, dim=1).flatten(0, 1)
    (view,) = views
    if rule.axis is None:
        return view
    length = size.padded_vocab_size if rule.is_padded else view.shape[rule.axis]
    there = view.shape[rule.axis]
    start, end = length // tp * tp_rank, length // tp * (tp_rank + 1)
    shard = view.narrow(rule.axis, min(start, there), min(end, there) - min(start, there))
    padding = end - start - shard.shape[rule.axis]
    return F.pad(shard, (0, 0, 0, padding)) if padding else shard


def from_shards(
    name: str, shards: Sequence[Tensor], family: Family, size: GPTSize
) -> Mapping[str, Tensor]:
    """Return their whole tensors by their names, contiguous, from our parameter's shards in rank
    order."""
    rule = _rule(name, family, size)
    whole = shards[0] if rule.axis is None else torch.cat(list(shards), rule.axis)
    if rule.is_padded:
        whole = whole[: size.vocab_size]
        if len(whole) < size.vocab_size:  # a token more than the network's
            whole = F.pad(whole, (0, 0, 0, size.vocab_size - len(whole)))
    parts = [whole]
    if rule.num_groups:
        groups = whole.unflatten(0, (rule.num_groups, -1))
        parts = [part.flatten(0, 1) for part in groups.split(list(rule.shares), dim=1)]
        if len(rule.stored) == 1:
            parts = [torch.cat(parts)]
    if rule.is_transposed:
        parts = [part.T for part in parts]
    if rule.first_row:
        parts = [F.pad(part, (0, 0, rule.first_row, 0)) for part in parts]
    names = (stored.name for stored in rule.stored)
    return {theirs: part.contiguous() for theirs, part in zip(names, parts, strict=True)}


def _split(views: list[Tensor], rule: _Rule) -> Sequence[Tensor]:
    """Return the parts of all groups, one after another in one tensor or each in its own."""
    if len(views) > 1:
        return views
    return views[0].split([rule.num_groups * share for share in rule.shares])


def _rule(name: str, family: Family, size: GPTSize) -> _Rule:
    match = _LAYER_NAME.fullmatch(name)
    module, _, kind = (match[2] if match else name).rpartition(".")
    if module == "output_layer" and size.form.is_tied:
        module = "embedding.word_embeddings"  # the last of several pipeline stages' copy
    ours = (_IN_LAYER if match else _OUTSIDE).get(module)
    known = ours is not None and _is_there(module, size)
    if ours is None or not known or kind not in _kinds(module, ours, size.form):
        raise ValueError(f"{name} is not a parameter of a {family.name} of this form")
    shape = tuple(_width(size, field) for field in ours.weight)
    axis = ours.axis
    if kind == "bias":
        shape, axis = shape[:1], 0 if axis == 0 else None
    groups, shares = _groups(module, family, size)
    is_transposed = family.is_conv and match is not None and len(shape) == 2
    first_row = family.first_position if module == _POSITIONS else 0
    theirs = _their_names(module, family, match[1] if match else None)
    rows = [groups * share for share in shares] if len(theirs) > 1 else [shape[0] + first_row]
    shapes = [(count, *shape[1:]) for count in rows]
    return _Rule(
        stored=tuple(
            Stored(f"{their}.{kind}", part[::-1] if is_transposed else part)
            for their, part in zip(theirs, shapes, strict=True)
        ),
        axis=axis,
        is_transposed=is_transposed,
        is_padded=ours.weight[0] == "vocab_size",
        first_row=first_row,
        num_groups=groups,
        shares=shares,
    )


def _groups(module: str, family: Family, size: GPTSize) -> tuple[int, tuple[int, ...]]:
    if module == _QKV and not family.qkv_by_head:
        queries = size.num_heads // size.num_kv_heads * size.head_dim
        return size.num_kv_heads, (queries, size.head_dim, size.head_dim)
    if module == _FC1 and size.form.is_gated:
        return size.ffn_size, (1, 1)
    return 0, ()


def _their_names(module: str, family: Family, layer: str | None) -> tuple[str, ...]:
    if module == "output_layer":
        return family.head[:1]
    if module == _SCORE:
        return (family.score,)
    found = family.tensors.get(module)
    if found is None:
        raise ValueError(f"a {family.name} has no {module}")
    prefix = family.trunk if layer is None else f"{family.trunk}{family.layers}{layer}."
    return tuple(prefix + name for name in ((found,) if isinstance(found, str) else found))


def _width(size: GPTSize, field: str) -> int:
    if field == "query_width":
        return size.num_heads * size.head_dim
    if field == "score_width":
        return 1
    width: int = getattr(size, field)
    return width


def _is_there(module: str, size: GPTSize) -> bool:
    form = size.form
    match module:
        case "embedding.project_in" | "project_out":
            return size.embedding_width > 0
        case "embedding.position_embeddings":
            return form.rotary is None
        case "decoder.final_layernorm":
            return not form.is_post_norm
        case "output_layer":
            return not form.is_tied
        case "self_attention.q_layernorm" | "self_attention.k_layernorm":
            return form.norms_heads
    return True


def _kinds(module: str, ours: _Ours, form: Form) -> tuple[str, ...]:
    if ours.is_norm:
        has_bias = form.norm == "layer"
    elif module in _OUTSIDE:
        has_bias = False
    else:
        part = "qkv" if module == _QKV else module.partition(".")[0].removeprefix("self_")
        has_bias = form.has_bias(part)  # type: ignore[arg-type]
    return ("weight", "bias") if has_bias else ("weight",)
