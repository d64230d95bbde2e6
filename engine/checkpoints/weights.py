"""The weights of one network, read from a checkpoint of any layout."""

from pathlib import Path

from engine.checkpoints.found import check_description, network_at
from engine.checkpoints.shards import adopt, read_state, sharded_weights
from engine.errors import UserError
from engine.training.finite import check_finite
from engine.training.network import Network


def load_weights(
    network: Network, path: Path, *, role: str, tokenizer_fingerprint: str = ""
) -> None:
    """Load the weights of the network `role` found at `path` into `network`, whatever layout wrote
    them.

    path is a run, one of its checkpoints, or a network's folder in one. A language model loads into
    the trunk of a scalar network, whose head stays as initialised. Raises UserError for what is
    missing or of another shape.
    """
    folder, description = network_at(path, role)
    check_description(description, folder, network, tokenizer_fingerprint)
    if network.kind == "language" and description["kind"] == "scalar":
        raise UserError(f"{folder} holds a reward model or critic where a language model is needed")
    state = sharded_weights(network)
    if network.kind == "scalar" and description["kind"] == "language":
        state = {
            chunk: {k: v for k, v in tensors.items() if not k.startswith("scalar_head.")}
            for chunk, tensors in state.items()
        }
    adopt(network, read_state(state, folder, network), strict=False)
    check_finite(network, not_finite_message(folder))


def not_finite_message(folder: Path) -> str:
    """Return what is said of weights in a folder that are not finite."""
    return f"{folder}: weights that are not finite; take an earlier checkpoint"
