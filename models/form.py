"""What sets one family of GPTs apart from another, beside its numbers of layers and dimensions.
Imports neither torch nor megatron.

A family is a choice of these fields, not a class: GPT-3's are the defaults. The tables of
models/huggingface say which fields each family of Hugging Face's folders has.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How the frequencies of rotary positions are stretched for contexts longer than those of
    training."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all by the factor (Chen et al. 2023); llama3: the low ones, and those between in part
    (Llama 3.1); yarn: by parts, with warmer attention (Peng et al. 2023)."""
    factor: float
    original_context: int = 0
    """Tokens of the context that the frequencies were trained in; 0 for linear."""
    low: float = 1.0
    """llama3's low_freq_factor; yarn's beta_slow: turns in the original context."""
    high: float = 4.0
    """llama3's high_freq_factor; yarn's beta_fast."""
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by (yarn)."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Positions as rotations of queries and keys (Su et al. 2021), halves of a head paired."""

    base: float = 10_000.0
    fraction: float = 1.0
    """Of a head's dimensions that turn: its first ones (GPT-NeoX: 0.25)."""
    scaling: RotaryScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a layer is put together; the defaults are GPT-2's and GPT-3's (Radford et al. 2019)."""

    norm: Literal["layer", "rms"] = "layer"
    """layer: with mean and bias (Ba et al. 2016); rms: without (Zhang and Sennrich 2019)."""
    norm_epsilon: float = 1e-5
    is_post_norm: bool = False
    """Norms are of the sum behind a branch, as in OPT-350m; else of what a branch reads, and once
    more at the end."""
    norms_heads: bool = False
    """Queries and keys have a norm of each head of their own (Qwen 3)."""
    activation: Activation = "gelu_tanh"
    """Of the MLP; gelu_tanh is the approximation that GPT-2 calls gelu_new."""
    is_gated: bool = False
    """The MLP multiplies the activation of one matrix by another's output (Shazeer 2020)."""
    rotary: Rotary | None = None
    """None: learned positions, added to the tokens' embeddings."""
    bias: Literal["all", "qkv", "attention", "mlp", "none"] = "all"
    """Which matrices have one; qkv: those of queries, keys and values alone (Qwen 2)."""
    is_tied: bool = True
    """The head is the tokens' embedding."""
    is_parallel: bool = False
    """Attention and MLP read the same hidden states, and both are added (GPT-NeoX)."""
    scales_by_layer: bool = False
    """Attention's scores of layer n, from 1, are divided by n (the GPT-2 of Stanford CRFM)."""
    window: int = 0
    """Tokens that a token attends to, itself included; 0: all before it."""
    windowed_layers: Literal["all", "every second"] = "all"
    """Which layers have the window. every second: the second, fourth and so on, GPT-3's locally
    banded ones (Brown et al. 2020, 2.1); the paper states no band."""

    def __post_init__(self) -> None:
        if self.is_parallel and self.is_post_norm:
            raise ValueError("is_parallel is of layers with their norms before")

    def has_bias(self, matrix: Literal["qkv", "attention", "mlp"]) -> bool:
        """Return whether a matrix of layers has a bias: that of queries, keys and values, that of
        attention's output, or those of the MLP."""
        with_qkv = ("attention", "qkv") if matrix == "qkv" else (matrix,)
        return self.bias in ("all", *with_qkv)


GPT3_FORM = Form()


def fields_that_differ(value: Any) -> dict[str, Any]:
    """Return the fields of a form, or a part of one, that are not the defaults, as JSON has them;
    those without a default are among them."""
    found = {}
    for field in dataclasses.fields(value):
        mine = getattr(value, field.name)
        if mine != field.default:
            found[field.name] = fields_that_differ(mine) if dataclasses.is_dataclass(mine) else mine
    return found


def form_of(stored: Any) -> Form:
    """Return the form that fields_that_differ wrote; raises ValueError for anything else."""
    found: Form = _part_of(Form, stored)
    return found


def _part_of(kind: type, stored: Any) -> Any:
    if not isinstance(stored, Mapping):
        raise ValueError(f"{kind.__name__.lower()} is no object")
    types = typing.get_type_hints(kind)
    unknown = sorted(set(map(str, stored)) - types.keys())
    if unknown:
        raise ValueError(f"{unknown[0][:60]!r} is no field of a {kind.__name__.lower()}")
    try:
        return kind(**{name: _value_of(types[name], name, v) for name, v in stored.items()})
    except TypeError:
        raise ValueError(f"a {kind.__name__.lower()} lacks fields") from None


def _value_of(kind: Any, name: str, value: Any) -> Any:
    choices = typing.get_args(kind)
    part = next((c for c in (kind, *choices) if dataclasses.is_dataclass(c)), None)
    if part is not None:
        return _part_of(typing.cast(type, part), value)
    if typing.get_origin(kind) is Literal:
        is_right = isinstance(value, str) and value in choices
    elif kind is float:
        is_right = type(value) in (int, float) and math.isfinite(value) and 0 < value < _LARGEST
    elif kind is int:
        is_right = type(value) is int and 0 <= value < _LARGEST
    else:
        is_right = type(value) is kind
    if not is_right:
        raise ValueError(f"{name} is {value!r:.60}")
    return value


_LARGEST = 1 << 40  # of any number of a form; our choice: a rotary base of 1e6 to 1e8 is common
