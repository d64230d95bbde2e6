"""A config.json of Hugging Face's and the size of our GPT, both ways, by the tables of families.py.
Imports neither torch nor megatron."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.form import Form, fields_that_differ
from models.huggingface.families import (
    FAMILIES,
    FOREIGN_TYPES,
    Choice,
    Family,
    export_order,
)
from models.huggingface.fields import positive, shown, whole_number
from models.huggingface.rotary import config_of_rotary, rotary_of_config
from models.huggingface.windows import config_of_window, window_of_config
from models.sizes import GPTSize

SCORE_BIAS_FIELD = "score_bias"
_LARGEST_BIAS = 3.4e38  # of fp32, as the head is
# The sizes that an export writes in full, which a size has as 0 where they are the usual ones.
_WRITTEN = {
    **{"query_groups": "num_kv_heads", "head_width": "head_dim", "inner_width": "ffn_size"},
    "embedding_width": "embedding_dim",
}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of the model that a config.json describes; raises ValueError."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    reason = FOREIGN_TYPES.get(model_type) if isinstance(model_type, str) else None
    named = ", ".join(f"{family.model_type!r}" for family in FAMILIES)
    because = f" ({reason})" if reason else ""
    raise ValueError(f"model_type is {shown(model_type)}{because}; only {named} convert")


def size_of_config(config: Mapping[str, Any]) -> GPTSize:
    """Return the size of the model that a config.json describes.

    Raises ValueError, naming the field, for a model that computes something else than ours.
    """
    family = family_of_config(config)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config is {shown(config['quantization_config'])}; weights convert as "
            "floats of 16 bits or more: save the model without quantization"
        )
    for name, value in family.fixed.items():
        given = config.get(name, value)
        if type(given) is not type(value) or given != value:
            raise ValueError(f"{name} is {shown(given)}; here every {family.name} has {value!r}")
    numbers = _read_numbers(_without_aliases(config, family), family)
    fields = {choice.ours: _read_choice(config, choice) for choice in family.choices}
    if family.epsilon is not None:
        name, default = family.epsilon
        fields["norm_epsilon"] = positive(name, config.get(name, default))
    if family.window:
        fields |= window_of_config(config, family, numbers["num_layers"])
    size = GPTSize(**numbers, form=dataclasses.replace(family.form, **fields))
    if family.splits_hidden and size.hidden_size % size.num_heads:
        raise ValueError(
            f"hidden_size {size.hidden_size} must be a multiple of num_attention_heads "
            f"{size.num_heads} in a {family.name}"
        )
    if family.rotary is None:
        return size
    rotary = rotary_of_config(
        config, family, head_dim=size.head_dim, context_length=size.context_length
    )
    return dataclasses.replace(size, form=dataclasses.replace(size.form, rotary=rotary))


def family_of_size(size: GPTSize) -> Family:
    """Return the family that models of a size are exported as: the first whose config.json says all
    of it. Raises ValueError where none does."""
    for family in export_order(size):
        try:
            if size_of_config(_described(size, family)) == size:
                return family
        except ValueError:
            continue
    said = ", ".join(f"{name} {value}" for name, value in fields_that_differ(size.form).items())
    raise ValueError(f"no family of Hugging Face's has all of this: {size} (of its form: {said})")


def config_of_size(
    size: GPTSize, *, dtype: str, eos_id: int, bos_id: int | None = None
) -> dict[str, Any]:
    """Return the config.json of a model of that size, whose end-of-text token is eos_id.

    bos_id: the token that begins a text; the end of text, as in GPT-2, where none does. dtype is
    torch's name of its weights' type, "float32". Raises ValueError for a size that is no family's.
    """
    family = family_of_size(size)
    return {
        "architectures": [family.architecture],
        **_described(size, family),
        "bos_token_id": eos_id if bos_id is None else bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def config_of_scorer(
    config: Mapping[str, Any], size: GPTSize, *, pad_id: int, score_bias: float
) -> dict[str, Any]:
    """Return the config.json of a model that scores texts, from what config_of_size gives.

    pad_id: what stands behind a text's last token, at which the score is read. score_bias: what
    scores are to be added, which transformers' classes do not.
    """
    return {
        **config,
        **({SCORE_BIAS_FIELD: score_bias} if score_bias else {}),
        "architectures": [family_of_size(size).scorer],
        "id2label": {"0": "LABEL_0"},  # one label: num_labels 1
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


def score_bias_of_config(config: Mapping[str, Any]) -> float:
    """Return what is to be added to a scorer's scores: a field of ours, which transformers' classes
    do not read. Raises ValueError."""
    value = config.get(SCORE_BIAS_FIELD, 0.0)
    if type(value) not in (int, float) or not abs(value) <= _LARGEST_BIAS:
        raise ValueError(f"{SCORE_BIAS_FIELD} is {shown(value)} and must be a finite number")
    return float(value)


def _described(size: GPTSize, family: Family) -> dict[str, Any]:
    """Return what of a size a family's config.json can say."""
    form = size.form
    config: dict[str, Any] = {"model_type": family.model_type}
    config |= {n.theirs: getattr(size, _WRITTEN.get(n.ours, n.ours)) for n in family.numbers}
    for choice in family.choices:
        config |= _written_choice(choice, form)
    if family.epsilon is not None:
        config[family.epsilon[0]] = form.norm_epsilon
    if family.rotary is not None and form.rotary is not None:
        config |= config_of_rotary(form.rotary, family)
    if family.window:
        config |= config_of_window(form, family, size.num_layers)
    return config | dict(family.fixed)


def _without_aliases(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return a config with the family's own names of what it says by others; raises ValueError
    where both are there and differ, of which transformers would take the alias."""
    found = dict(config)
    for alias, name in family.aliases.items():
        if alias in config and found.setdefault(name, config[alias]) != config[alias]:
            raise ValueError(
                f"{name} is {shown(config[name])} and {alias}, another name for it, "
                f"{shown(config[alias])}: remove the wrong one"
            )
    return found


def _read_numbers(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number in family.numbers:
        value = config.get(number.theirs, number.default)
        if value is None and number.default != -1:
            continue
        if number.theirs in config or number.default == -1:
            value = whole_number(config, number.theirs)
        numbers[number.ours] = value
    return numbers


def _read_choice(config: Mapping[str, Any], choice: Choice) -> Any:
    defaults = zip(choice.theirs, choice.default, strict=True)
    given = tuple(config.get(name, default) for name, default in defaults)
    for theirs, ours in choice.taken:
        if all(type(g) is type(t) and g == t for g, t in zip(given, theirs, strict=True)):
            return ours
    fields = zip(choice.theirs, given, strict=True)
    said = " and ".join(f"{name} is {shown(value)}" for name, value in fields)
    taken = ", ".join(" and ".join(map(repr, theirs)) for theirs, _ in choice.taken)
    raise ValueError(f"{said}; what converts is {taken}")


def _written_choice(choice: Choice, form: Form) -> dict[str, Any]:
    wanted = getattr(form, choice.ours)
    theirs = next((theirs for theirs, ours in choice.taken if ours == wanted), choice.default)
    return dict(zip(choice.theirs, theirs, strict=True))
