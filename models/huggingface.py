"""Hugging Face's GPT-2 and our language model: configurations, tensor names and splits, both ways.

"Theirs" is a tensor of GPT2LMHeadModel, whole; "ours" is a parameter of models.gpt.GPT as
megatron-core lays it out, of which a tensor-parallel rank holds a shard. Besides the names, three
things differ. Their matrices are Conv1D's: [in, out] where a linear layer has [out, in]. Their
query, key and value follow one another as [3, heads, dim] where megatron-core has [heads, 3, dim].
So a block of rows is whole heads (SelfAttention.get_query_key_value_tensors). Our vocabulary
is padded, with rows of zeros that are masked everywhere.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sizes import GPTSize

WORD_EMBEDDING = "transformer.wte.weight"
TIED_HEAD = "lm_head.weight"  # stored by some files beside the embedding that it is

# The field of GPTSize that a field of config.json gives.
_SIZE_FIELDS = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
}
# What else decides what a GPT-2 computes: our value of it, which is also GPT2Config's default.
_FIXED_FIELDS: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one formula, three spellings

_LARGEST = 1 << 24  # of any size in a config.json; our choice: a hundred times those of any model
_MOST_SHOWN = 60  # characters of a value of config.json in an error; our choice

_PREFIX = "transformer."
# Constant causal masks that older files store: transformer.h.0.attn.bias [1, 1, length, length].
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class _Rule:
    theirs: str  # their name, below the model or below the layer
    shape: tuple[int, ...]  # of theirs, in multiples of the hidden size; empty for the embeddings
    axis: int | None  # of ours, which tensor parallelism splits; None: every rank holds all of it


_LAYER_RULES = {
    "input_layernorm.weight": _Rule("ln_1.weight", (1,), None),
    "input_layernorm.bias": _Rule("ln_1.bias", (1,), None),
    "self_attention.linear_qkv.weight": _Rule("attn.c_attn.weight", (1, 3), 0),
    "self_attention.linear_qkv.bias": _Rule("attn.c_attn.bias", (3,), 0),
    "self_attention.linear_proj.weight": _Rule("attn.c_proj.weight", (1, 1), 1),
    "self_attention.linear_proj.bias": _Rule("attn.c_proj.bias", (1,), None),
    "pre_mlp_layernorm.weight": _Rule("ln_2.weight", (1,), None),
    "pre_mlp_layernorm.bias": _Rule("ln_2.bias", (1,), None),
    "mlp.linear_fc1.weight": _Rule("mlp.c_fc.weight", (1, 4), 0),
    "mlp.linear_fc1.bias": _Rule("mlp.c_fc.bias", (4,), 0),
    "mlp.linear_fc2.weight": _Rule("mlp.c_proj.weight", (4, 1), 1),
    "mlp.linear_fc2.bias": _Rule("mlp.c_proj.bias", (1,), None),
}
_MODEL_RULES = {
    "embedding.word_embeddings.weight": _Rule("wte.weight", (), 0),
    "output_layer.weight": _Rule("wte.weight", (), 0),  # the last of several pipeline stages' copy
    "embedding.position_embeddings.weight": _Rule("wpe.weight", (), None),
    "decoder.final_layernorm.weight": _Rule("ln_f.weight", (1,), None),
    "decoder.final_layernorm.bias": _Rule("ln_f.bias", (1,), None),
}


def size_of_config(config: Mapping[str, Any]) -> GPTSize:
    """Return the size of the model that a config.json describes.

    Raises ValueError, naming the field, for a model that computes something else than ours.
    """
    if config.get("model_type") != "gpt2":
        shown = _shown(config.get("model_type"))
        raise ValueError(f"model_type is {shown}; only 'gpt2' converts")
    for field in _SIZE_FIELDS:
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{field} is {_shown(value)} and must be a whole number from 1 to {_LARGEST}"
            )
    n_inner, width = config.get("n_inner"), config["n_embd"]
    if n_inner not in (None, 4 * width):
        raise ValueError(
            f"n_inner is {_shown(n_inner)}; here an MLP is 4 x n_embd = {4 * width} wide"
        )
    for field, ours in _FIXED_FIELDS.items():
        value = config.get(field, ours)
        is_ours = value in _TANH_GELUS if field == "activation_function" else value == ours
        if not is_ours:
            raise ValueError(f"{field} is {_shown(value)}; here every model has {ours!r}")
    return GPTSize(**{ours: config[theirs] for theirs, ours in _SIZE_FIELDS.items()})


def config_of_size(size: GPTSize, *, dtype: torch.dtype, eos_id: int) -> dict[str, Any]:
    """Return the config.json of a model of that size, whose end-of-text token is eos_id."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(size, ours) for theirs, ours in _SIZE_FIELDS.items()},
        "n_inner": None,
        **_FIXED_FIELDS,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tensor_shapes(size: GPTSize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor of theirs, the tied head left out."""
    yield WORD_EMBEDDING, (size.vocab_size, size.hidden_size)
    yield f"{_PREFIX}wpe.weight", (size.context_length, size.hidden_size)
    for layer in range(size.num_layers):
        for rule in _LAYER_RULES.values():
            yield f"{_PREFIX}h.{layer}.{rule.theirs}", _shape(rule, size)
    for rule in _MODEL_RULES.values():
        if rule.shape:
            yield f"{_PREFIX}{rule.theirs}", _shape(rule, size)


def canonical_name(stored: str) -> str | None:
    """Return GPT2LMHeadModel's name of a tensor in a file; None for a constant that is no weight.

    Files of the bare trunk (GPT2Model, GPT-2's own on the hub) leave the prefix "transformer." out.
    """
    is_complete = stored == TIED_HEAD or stored.startswith(_PREFIX)
    name = stored if is_complete else _PREFIX + stored
    return None if _MASK_BUFFER.fullmatch(name) else name


def huggingface_name(name: str) -> str:
    """Return their name of our parameter `name`; its layers count from 0 in the whole model."""
    rule, layer = _find(name)
    return f"{_PREFIX}{rule.theirs}" if layer is None else f"{_PREFIX}h.{layer}.{rule.theirs}"


def to_shard(name: str, tensor: Tensor, size: GPTSize, *, tp: int, tp_rank: int) -> Tensor:
    """Return what rank tp_rank of tp holds of our parameter `name`, from their whole tensor."""
    rule, _ = _find(name)
    if rule.theirs == "wte.weight":
        tensor = F.pad(tensor, (0, 0, 0, size.padded_vocab_size - size.vocab_size))
    if len(rule.shape) == 2:
        tensor = tensor.T  # Conv1D's [in, out] to [out, in]
    if _is_qkv(rule):
        tensor = _swap_leading(tensor, 3, size.num_heads)
    return tensor if rule.axis is None else tensor.chunk(tp, rule.axis)[tp_rank]


def from_shards(name: str, shards: Sequence[Tensor], size: GPTSize) -> Tensor:
    """Return their whole tensor, contiguous, from our parameter's shards in rank order."""
    rule, _ = _find(name)
    tensor = shards[0] if rule.axis is None else torch.cat(list(shards), rule.axis)
    if _is_qkv(rule):
        tensor = _swap_leading(tensor, size.num_heads, 3)
    if len(rule.shape) == 2:
        tensor = tensor.T
    if rule.theirs == "wte.weight":
        tensor = tensor[: size.vocab_size]
    return tensor.contiguous()


def _find(name: str) -> tuple[_Rule, int | None]:
    """Return the rule of our parameter and the number of its layer, if it is in one."""
    match = _LAYER_NAME.fullmatch(name)
    rule = _LAYER_RULES.get(match[2]) if match else _MODEL_RULES.get(name)
    if rule is None:
        raise ValueError(f"{name} is not a parameter of a GPT-2")
    return rule, int(match[1]) if match else None


def _shown(value: Any) -> str:
    """Return a value of config.json in a few characters."""
    return f"{value!r:.{_MOST_SHOWN}}"


def _shape(rule: _Rule, size: GPTSize) -> tuple[int, ...]:
    return tuple(multiple * size.hidden_size for multiple in rule.shape)


def _is_qkv(rule: _Rule) -> bool:
    return rule.theirs.startswith("attn.c_attn.")


def _swap_leading(tensor: Tensor, first: int, second: int) -> Tensor:
    """Reorder rows [first, second, dim] to [second, first, dim]; what follows them stays."""
    rows = tensor.unflatten(0, (first, second, -1))
    return rows.transpose(0, 1).flatten(0, 2)
