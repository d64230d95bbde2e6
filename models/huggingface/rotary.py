"""Rotary positions in a config.json, both ways. Imports neither torch nor megatron.

transformers 4 writes rope_theta and rope_scaling; transformers 5 writes rope_parameters, with both
inside. GPT-NeoX had names of its own. All are read, and an export has transformers 4's, which
either reads. Formulas are those of transformers.modeling_rope_utils.
"""

import math
from collections.abc import Mapping
from typing import Any

from models.form import Rotary, RotaryScaling
from models.huggingface.families import Family
from models.huggingface.fields import positive, shown, whole_number

_BASE = 10_000.0  # RotaryEmbeddingConfigMixin.default_theta
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # _compute_yarn_parameters
_KINDS = ("default", "linear", "llama3", "yarn")


def rotary_of_config(
    config: Mapping[str, Any], family: Family, *, head_dim: int, context_length: int
) -> Rotary:
    """Return the rotations that a config.json of a rotary family describes; raises ValueError."""
    where, inner = _parameters(config)
    base, fraction = (
        _agreed(config, family, where, inner, name)
        for name in ("rope_theta", "partial_rotary_factor")
    )
    fraction = family.rotary_fraction if fraction is None else fraction
    turning = int(head_dim * fraction)
    if not 0 < fraction <= 1 or turning % 2 or not turning:
        raise ValueError(
            f"a rotation of {fraction:g} of a head's {head_dim} dimensions; "
            "it must be an even number of them"
        )
    if family.rotary_fraction == 1 and fraction != 1:
        raise ValueError(
            f"partial_rotary_factor is {fraction:g}; a {family.name}'s heads turn whole"
        )
    scaling = _scaling(config, where, inner, context_length)
    return Rotary(base=_BASE if base is None else base, fraction=fraction, scaling=scaling)


def config_of_rotary(rotary: Rotary, family: Family) -> dict[str, Any]:
    """Return the fields that rotary_of_config reads as these rotations, where the family can."""
    names = family.rotary or {}
    fields: dict[str, Any] = {names["rope_theta"][0]: rotary.base}
    if family.rotary_fraction != 1:
        fields[names["partial_rotary_factor"][0]] = rotary.fraction
    fields["rope_scaling"] = None
    if (scaling := rotary.scaling) is not None:
        inner: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            inner["original_max_position_embeddings"] = scaling.original_context
        if scaling.kind == "llama3":
            inner |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind == "yarn":
            inner |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
            inner["attention_factor"] = scaling.attention_factor
        fields["rope_scaling"] = inner
    return fields


def _parameters(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return what the scaling is in, and its name; nothing for neither of the two spellings."""
    found = [name for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    if not found:
        return "rope_scaling", {}
    inner = config[found[0]]
    if any(config[name] != inner for name in found):
        raise ValueError("rope_scaling and rope_parameters differ")
    if not isinstance(inner, Mapping):
        raise ValueError(f"{found[0]} is {shown(inner)}, no object")
    for kind, value in inner.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{found[0]} has {shown(kind)}: here all layers turn alike")
    return found[0], inner


def _agreed(
    config: Mapping[str, Any], family: Family, where: str, inner: Mapping[str, Any], name: str
) -> float | None:
    """Return the number that all spellings of it say, None where there is none."""
    spelled = {f"{where}.{name}": inner.get(name)}
    spelled |= {theirs: config.get(theirs) for theirs in (family.rotary or {})[name]}
    numbers = {key: positive(key, value) for key, value in spelled.items() if value is not None}
    if len(set(numbers.values())) > 1:
        said = " and ".join(f"{key} is {value:g}" for key, value in numbers.items())
        raise ValueError(f"{said}: which is it?")
    return next(iter(numbers.values()), None)


def _scaling(
    config: Mapping[str, Any], where: str, inner: Mapping[str, Any], context_length: int
) -> RotaryScaling | None:
    kinds = [inner[name] for name in ("rope_type", "type") if inner.get(name) is not None]
    kind = kinds[0] if kinds else "default"
    if kind not in _KINDS or any(other != kind for other in kinds):
        said = " and ".join(map(shown, kinds))
        raise ValueError(f"{where}.rope_type is {said}; {', '.join(_KINDS)} convert")
    if kind == "default":
        return None

    def number(name: str, default: float | None = None, at_least: float = 0.0) -> float:
        value = inner.get(name)
        value = default if value is None else value
        return positive(f"{where}.{name}", value, at_least=at_least)

    if kind == "linear":
        return RotaryScaling(kind="linear", factor=number("factor", at_least=1.0))
    name = "original_max_position_embeddings"
    sources = (config, inner, {name: context_length})  # the first that has it, as transformers does
    original = whole_number(next(s for s in sources if s.get(name) is not None), name)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise ValueError(f"{where}: low_freq_factor {low:g} is not below high_freq_factor")
        factor = number("factor", at_least=1.0)
        return RotaryScaling(
            kind="llama3", factor=factor, original_context=original, low=low, high=high
        )
    if inner.get("truncate", True) is not True:
        raise ValueError(f"{where}.truncate is {shown(inner['truncate'])}; here it is True")
    factor = number("factor", context_length / original, at_least=1.0)
    warmth = [number(name) if inner.get(name) else 0.0 for name in ("mscale", "mscale_all_dim")]
    usual = _warmer(factor)
    if all(warmth):
        usual = _warmer(factor, warmth[0]) / _warmer(factor, warmth[1])
    return RotaryScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        low=number("beta_slow", _BETA_SLOW),
        high=number("beta_fast", _BETA_FAST),
        attention_factor=number("attention_factor", usual),
    )


def _warmer(factor: float, by: float = 1.0) -> float:
    """Return what attention's cosines and sines are multiplied by (Peng et al. 2023, 3.4)."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
