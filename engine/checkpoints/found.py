"""Where a network lies on disk and what it is, as the first rank sees it.

Ranks that looked for themselves could see different states of a shared file system.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.candidates import candidates_at, read_description
from engine.checkpoints.index import Index, read_index
from engine.checkpoints.manifest import Damage, read_manifest
from engine.checkpoints.recorded import check_progress
from engine.checkpoints.retention import step_of
from engine.checkpoints.whole import newest_whole, warn
from engine.errors import UserError
from engine.files import read_object
from engine.ranks.first_rank import said_by_first_rank
from engine.training.network import Network
from models.sizes import GPTSize, Kind


@dataclass(frozen=True, kw_only=True)
class FoundNetwork:
    """A network in a whole checkpoint."""

    folder: Path
    kind: Kind
    size: GPTSize
    tokenizer: str
    """Fingerprint of the tokenizer that it was trained with; "" where none is known."""
    index: Index


def network_at(path: Path, role: str, *, strict: bool = False) -> FoundNetwork:
    """Return the network `role` found at a path, whose files are as they were written; all ranks
    call together.

    path is a run, one of its checkpoints, or a network's folder in one. Where a run's newest
    checkpoint is damaged, the newest whole one is taken, which is said; strict: it is an error, as
    it is for a checkpoint that was named or selected. Raises UserError.
    """
    looked = json.loads(said_by_first_rank(lambda: json.dumps(candidates_at(path, role))))
    folders, damage = [Path(folder) for folder in looked["folders"]], looked["damage"]

    def is_needed(name: str) -> bool:
        folder, _, file = name.partition("/")
        return folder == looked["role"] and not file.startswith("optimizer-")

    whole, damage = newest_whole(folders, is_needed, damage)
    if whole is None or (damage and strict):
        raise UserError(damage + ("" if whole is None else f"; {whole} is whole: name that"))
    if damage:
        warn(f"{damage}\nWARNING: {whole}, the newest whole checkpoint, is taken instead")
    return read_network(whole / looked["role"])


def find_network(path: Path, role: str, *, strict: bool = False) -> Path:
    """Return the folder of network `role` at a path, as network_at finds it."""
    return network_at(path, role, strict=strict).folder


def read_network(folder: Path) -> FoundNetwork:
    """Return what a network's folder says of it; raises UserError where that cannot be, or is more
    than its files hold."""
    kind, size, tokenizer = read_description(folder)
    index = read_index(folder, read_manifest(folder.parent))
    found = FoundNetwork(folder=folder, kind=kind, size=size, tokenizer=tokenizer, index=index)
    _check_tensors(found)
    return found


def run_of(folder: Path) -> Path:
    """Return the run that a network's folder, RUN/checkpoints/STEP/ROLE, is a part of."""
    return folder.resolve().parents[2]


def size_of(path: Path, role: str, *, strict: bool = False) -> GPTSize:
    """Return the size of the network at `path`, as network_at finds it."""
    return network_at(path, role, strict=strict).size


def check_description(found: FoundNetwork, network: Network, fingerprint: str) -> None:
    """Raise UserError where a network on disk has another shape, or another tokenizer's."""
    for field in dataclasses.fields(GPTSize):
        a, b = getattr(found.size, field.name), getattr(network.size, field.name)
        if a != b:
            raise UserError(f"{found.folder}: {field.name} is {a}, this run's model has {b}")
    if fingerprint and found.tokenizer and found.tokenizer != fingerprint:
        raise UserError(
            f"{found.folder}: trained with another tokenizer than this run's; "
            "give the tokenizer that was saved beside that checkpoint's run"
        )


def _check_tensors(found: FoundNetwork) -> None:
    """Raise Damage where tensors are not of the network's size: nothing is built from a size that
    the files do not have."""
    size, tensors = found.size, found.index.tensors
    wanted: dict[str, tuple[int, ...]] = {
        "decoder.layers.self_attention.linear_qkv.weight": (
            *(size.num_layers, size.qkv_width, size.hidden_size),
        ),
        "decoder.layers.self_attention.linear_proj.weight": (
            *(size.num_layers, size.hidden_size, size.num_heads * size.head_dim),
        ),
        "decoder.layers.mlp.linear_fc1.weight": (
            *(size.num_layers, size.fc1_width, size.hidden_size),
        ),
    }
    if size.form.rotary is None:
        wanted["embedding.position_embeddings.weight"] = (size.context_length, size.hidden_size)
    if size.embedding_width:
        wanted["embedding.project_in.weight"] = (size.hidden_size, size.embedding_dim)
        wanted["project_out.weight"] = (size.embedding_dim, size.hidden_size)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            raise Damage(f"{found.folder}: {name} is not {list(shape)}, as network.json says")
    words = tensors.get("embedding.word_embeddings.weight")
    width = size.embedding_dim
    if words is None or words.shape[1:] != (width,) or words.shape[0] < size.vocab_size:
        raise Damage(
            f"{found.folder}: its vocabulary is not {size.vocab_size} tokens of width {width}, "
            "as network.json says"
        )


def progress_in(folder: Path) -> dict[str, Any]:
    """Return the progress that a checkpoint of a step was saved with; raises Damage."""
    progress, step = read_object(folder / "progress.json"), read_manifest(folder).step
    if step is None or not progress.get("step") == step == step_of(folder.name):
        raise Damage(f"{folder}: not the progress of step {step}")
    try:
        check_progress(progress)
    except ValueError as error:
        raise Damage(f"{folder / 'progress.json'}: {error}") from None
    return progress
