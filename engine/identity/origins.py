"""What has become of where a run's networks came from, since the run took its copies."""

from pathlib import Path

from engine.checkpoints.manifest import MANIFEST
from engine.checkpoints.sources import newest_source
from engine.errors import UserError
from engine.identity.made_from import NamedNetwork
from engine.identity.record import NetworkRecord

_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")


def note_of_origin(record: NetworkRecord, network: NamedNetwork, copy: Path) -> str:
    """Return what is to be said of it, on the rank that asks; "" where it is as it was. No weights
    are read."""
    if record.model_xxh3_128:
        return _note_of_folder(network.path, copy)
    try:
        step, digest = newest_source(network.path, network.role)
    except (UserError, OSError):
        return f"{network.path}: no {network.role} is there now; this run keeps its own copy of it"
    if digest == record.xxh3_128:
        return ""
    was = "" if record.step is None or step is None else f": step {record.step} -> {step}"
    return f"{network.path} has gone on since{was}; this run keeps its own copy of it"


def _note_of_folder(folder: Path, copy: Path) -> str:
    """Return note_of_origin of a Hugging Face folder, as far as times of files tell: a digest would
    read all weights. One that is gone needs no word: the copy was made so that it may go."""
    try:
        taken = (copy / MANIFEST).stat().st_mtime_ns
        files = [file for name in _MODEL_FILES for file in folder.glob(name)]
        is_later = any(file.stat().st_mtime_ns > taken for file in files)
    except OSError:
        return ""
    if not is_later:
        return ""
    return (
        f"{folder} was written to since this run took its model; this run keeps its own copy of it"
    )
