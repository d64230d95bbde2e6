"""What lies where a model's folder of Hugging Face's was meant, in words: other formats, a cache, a
file, and what to do with each."""

import contextlib
import os
import re
from pathlib import Path

from engine.errors import UserError, named
from engine.files import MAX_SHOWN_PATH, hub_name, link_to_nothing, read_object

_MAX_NAMES = 10_000  # of a folder that are looked at; our choice
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"(model|pytorch_model)\.(safetensors|bin)(\.index\.json)?")
# What a run, its folder of checkpoints, a checkpoint and a network of ours have.
_OURS = ("checkpoints", "latest", "manifest.json", "network.json")
# What a folder without our weights holds instead: a pattern of names, and what that is.
_FORMATS: tuple[tuple[str, str], ...] = (
    (
        r"adapter_(config\.json|model\.(safetensors|bin))",
        "a LoRA adapter: merge it into its base model (peft: merge_and_unload, then "
        "save_pretrained) and give that folder",
    ),
    (
        r".*\.gguf",
        "GGUF, llama.cpp's format: give the folder of safetensors that it was made from",
    ),
    (
        r"tf_model.*\.h5|flax_model.*\.msgpack",
        "weights of TensorFlow or Flax: transformers 4 loads them (from_tf, from_flax), and its "
        "save_pretrained makes the folder to give",
    ),
    (
        r"(model|pytorch_model)\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)"
        r"|(model\.safetensors|pytorch_model\.bin)\.index\.\w+\.json",
        "a variant, which the name before its ending says: give it the name model.safetensors or "
        "pytorch_model.bin, its index likewise",
    ),
    (
        r"consolidated.*\.(pth|safetensors)|params\.json",
        "the format of Meta's or Mistral's own releases: take the one with a config.json and "
        "model.safetensors",
    ),
    (
        r"zero_to_fp32\.py|(zero|mp_rank|bf16_zero)_.*|global_step\d+",
        "DeepSpeed's parts: python zero_to_fp32.py . NEW makes the weights to give",
    ),
    (
        r".*\.distcp|pytorch_model_fsdp.*",
        "FSDP's parts: accelerate merge-weights makes the file to give",
    ),
    (
        r".*\.(onnx|nemo|ckpt|pth|pt|ot|mlmodel)",
        "another program's format: transformers' save_pretrained makes the folder to give",
    ),
    (
        r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)",
        "parts of the weights without their index (model.safetensors.index.json): download it too",
    ),
)


def is_foreign(path: Path) -> bool:
    """Return whether a path means a model of Hugging Face's or another program's, and none of ours,
    by its config.json or else the names there: whoever reads it says what is wrong with it."""
    if not path.is_dir():
        return bool(_WEIGHTS.fullmatch(path.name)) or _format(path.name) is not None
    try:
        config = read_object(path / "config.json")
    except UserError:
        config = {}
    if config.keys() & {"model_type", "architectures"}:
        return True
    if _is_ours(path):
        return False
    names = _names_in(path)
    return any(map(_WEIGHTS.fullmatch, names)) or _other_form(path, names) is not None


def require_model_folder(folder: Path) -> None:
    """Raise UserError, saying what it is and what to do, where `folder` is none with a config.json
    of Hugging Face's."""
    name = named(folder, MAX_SHOWN_PATH)
    if folder.is_dir():
        if _is_ours(folder) and not is_foreign(folder):
            raise UserError(
                f"{name} is a run of ours or a part of one, and no folder of Hugging Face's: a "
                "stage starts from it as it is; recipes/convert_hf.py export makes a folder of it"
            )
        if not os.path.lexists(folder / "config.json"):
            raise UserError(f"{name} holds no config.json{held_instead(folder)}")
        return
    if not folder.exists():
        why = link_to_nothing(folder) or f": no such folder{hub_name(folder)}"
        raise UserError(f"{name}{why}")
    what = _format(folder.name)
    if what is None or folder.suffix in (".safetensors", ".bin"):
        what = f"a file: give its folder, {named(folder.parent, MAX_SHOWN_PATH)}"
    raise UserError(f"{name} is {what}")


def refuse_foreign(path: Path) -> None:
    """Raise UserError where a run of ours is wanted and a path means another program's model."""
    if is_foreign(path):
        require_model_folder(path)
        raise UserError(
            f"{named(path, MAX_SHOWN_PATH)} is a Hugging Face folder already: use it as it is; "
            "for other files or another dtype import it first, and export that run"
        )


def held_instead(folder: Path) -> str:
    """Return what to say of a folder that lacks a model's files: the first thing in it that says
    what it is."""
    names = _names_in(folder)
    if (said := _other_form(folder, names)) is not None:
        return said
    for name in names:
        if (folder / name / "config.json").is_file():
            return f"; {named(name)} in it does: give that folder"
    return ""


def _is_ours(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in _OURS)


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False))
    except OSError:
        return []


def _other_form(folder: Path, names: list[str]) -> str | None:
    """Return what to say of a folder whose names say what it is, None where none does."""
    if "snapshots" in names:
        return _snapshot(folder)
    if any(name.startswith("models--") for name in names):
        first = next(name for name in names if name.startswith("models--"))
        return f"; it is a cache of the hub: give a model's snapshot, {named(first)}/snapshots/HASH"
    for name in names:
        if (what := _format(name)) is not None:
            return f"; its {named(name)} is {what}"
    steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    if steps:
        newest = folder / f"checkpoint-{max(steps)}"
        return f"; it is a Trainer's output: give a checkpoint, {newest}"
    return None


def _snapshot(folder: Path) -> str:
    """Return what to say of a model's folder in the hub's cache, whose files are in a snapshot."""
    found, main = [], ""
    with contextlib.suppress(OSError):
        found = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
        main = (folder / "refs" / "main").read_text(errors="replace")[:80].strip()
    if not found:
        return "; it is a cache of the hub without a snapshot: download the model again"
    chosen = main if main in found else found[-1]
    return f"; it is a cache of the hub: give {folder / 'snapshots' / chosen}"


def _format(name: str) -> str | None:
    for pattern, what in _FORMATS:
        if re.fullmatch(pattern, name):
            return what
    return None
