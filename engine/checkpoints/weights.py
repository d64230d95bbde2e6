"""The weights of one network, read from a checkpoint of any layout."""

from pathlib import Path

from engine.checkpoints.found import check_description, network_at
from engine.checkpoints.reading import read_shared
from engine.checkpoints.shards import weight_parts
from engine.errors import UserError
from engine.training.finite import check_finite
from engine.training.network import Network


def load_weights(
    network: Network,
    path: Path,
    *,
    role: str,
    tokenizer_fingerprint: str = "",
    strict: bool = False,
    must_be_finite: bool = True,
) -> None:
    """Load the weights of the network `role` found at `path` into `network`, whatever layout wrote
    them.

    path is a run, one of its checkpoints, or a network's folder in one; strict as in network_at. A
    language model loads into the trunk of a scalar network, whose head stays as initialised. Raises
    UserError for what is missing, damaged or of another shape; where must_be_finite, also for
    weights that are not.
    """
    found = network_at(path, role, strict=strict)
    check_description(found, network, tokenizer_fingerprint)
    if network.kind == "language" and found.kind == "scalar":
        raise UserError(
            f"{found.folder} holds a reward model or critic where a language model is needed"
        )
    parts = weight_parts(network)
    if network.kind == "scalar" and found.kind == "language":
        parts = [part for part in parts if not part.shard.name.startswith("scalar_head.")]
    read_shared(parts, found.folder, found.index, network.parallel)
    network.mark_changed()
    if must_be_finite:
        check_finite(network, not_finite_message(found.folder))


def not_finite_message(folder: Path) -> str:
    """Return what is said of weights in a folder that are not finite."""
    return f"{folder}: weights that are not finite; take an earlier checkpoint"
