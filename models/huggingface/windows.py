"""Windows of attention in a config.json, both ways. Imports neither torch nor megatron.

Mistral's is of all layers. Qwen's config.json says which layers have it: those from
max_window_layers on, or those that layer_types calls sliding_attention.
"""

from collections.abc import Mapping
from typing import Any

from models.form import Form
from models.huggingface.families import Family
from models.huggingface.fields import shown, whole_number

_WIDTH = 4096  # of transformers' MistralConfig, Qwen2Config and Qwen3Config
_FIRST_LAYER = 28  # max_window_layers of the latter two
_FULL, _SLIDING = "full_attention", "sliding_attention"


def window_of_config(config: Mapping[str, Any], family: Family, num_layers: int) -> dict[str, Any]:
    """Return the fields `window` and `windowed_layers` of the form that a config.json describes.

    Raises ValueError for windows in layers that a form cannot name.
    """
    width = config.get("sliding_window", _WIDTH)
    if family.window == "by layer" and not _flag(config, "use_sliding_window"):
        width = None
    first = config.get("max_window_layers", _FIRST_LAYER) if family.window == "by layer" else 0
    if type(first) is not int:
        raise ValueError(f"max_window_layers is {shown(first)} and must be a whole number")
    if width is not None:
        width = whole_number({"sliding_window": width}, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        # Two numbers say it as well, however many layers a config.json claims.
        has_none = width is None or first >= num_layers
        if not has_none and first > 0:
            raise _mixed(f"max_window_layers is {first} of {num_layers} layers")
        return {} if has_none else {"window": width}
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"layer_types is {shown(kinds)}: no list of {num_layers}")
    if any(kind not in (_FULL, _SLIDING) for kind in kinds) or (
        width is None and _SLIDING in kinds
    ):
        raise _mixed(f"layer_types is {shown(kinds)}")
    if _SLIDING not in kinds:
        return {}
    for layers in ("all", "every second"):
        if kinds == _kinds(layers, num_layers):
            return {"window": width, "windowed_layers": layers}
    raise _mixed(f"layer_types is {shown(kinds)}")


def config_of_window(form: Form, family: Family, num_layers: int) -> dict[str, Any]:
    """Return the fields that window_of_config reads as a form's window, where the family can."""
    width = form.window or None
    if family.window == "all":
        return {"sliding_window": width}
    fields: dict[str, Any] = {"use_sliding_window": width is not None, "sliding_window": width}
    fields["max_window_layers"] = 0 if form.windowed_layers == "all" and width else num_layers
    if width is not None:
        fields["layer_types"] = _kinds(form.windowed_layers, num_layers)
    return fields


def _kinds(layers: str, num_layers: int) -> list[str]:
    return [_SLIDING if layers == "all" or n % 2 else _FULL for n in range(num_layers)]


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if type(value) is not bool:
        raise ValueError(f"{name} is {shown(value)} and must be true or false")
    return value


def _mixed(said: str) -> ValueError:
    return ValueError(f"{said}: here a window is of all layers, or of the second, fourth and so on")
