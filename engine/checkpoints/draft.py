"""What a checkpoint will hold: this rank's files of tensors, and what the first rank writes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoints.shards import average_parts, dealt, optimizer_parts, weight_parts
from engine.checkpoints.tensor_file import TensorFile, tensor_file
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer
from models.sizes import size_as_json


@dataclasses.dataclass(kw_only=True)
class Draft:
    """A checkpoint that is to be written."""

    folder: Path
    """Its place."""
    step: int | None
    """None of weights alone, which no run resumes from."""
    published: Callable[[], None] = lambda: None
    """Called on the first rank once the checkpoint is whole and in its place."""
    files: list[TensorFile] = dataclasses.field(default_factory=list)
    """Of this rank."""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the first rank writes, by the names within the checkpoint."""
    blobs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """What it writes besides that is no text."""
    counts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By network: its optimizer's counts."""

    @property
    def partial(self) -> Path:
        """Where it lies until it is whole."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    def add_network(
        self, role: str, network: Network, optimizer: Optimizer | None, tokenizer: str
    ) -> None:
        """Add a network's weights, and its optimizer's state where one is given.

        tokenizer: the fingerprint of the one that it was trained with.
        """
        parts = weight_parts(network)
        owners = dealt(parts, network.parallel.num_replicas)
        mine = network.parallel.replica_rank
        weights = [p for p, owner in zip(parts, owners, strict=True) if owner == mine]
        self._add_file(role, "weights", network, weights)
        if optimizer is not None:
            self._add_file(role, "optimizer", network, optimizer_parts(optimizer))
        self._describe(role, network, {} if optimizer is None else optimizer.counts(), tokenizer)

    def add_average(self, role: str, average: EMA, tokenizer: str) -> None:
        """Add averaged weights, in the place of a network's, so that they load as one."""
        network = average.optimizer.network
        self._add_file(role, "weights", network, average_parts(average))
        self._describe(role, network, {}, tokenizer)

    def _add_file(self, role: str, what: str, network: Network, parts: list) -> None:
        written = [part for part in parts if part.shard.is_written]
        if written:  # a rank may own nothing but padding, of a small model on many replicas
            name = f"{role}/{what}-{network.parallel.rank:05d}.safetensors"
            self.files.append(tensor_file(name, written))

    def _describe(
        self, role: str, network: Network, counts: dict[str, Any], tokenizer: str
    ) -> None:
        self.counts[role] = counts
        description = {
            "kind": network.kind,
            "size": size_as_json(network.size),
            "tokenizer": tokenizer,
        }
        self.texts[f"{role}/network.json"] = json.dumps(description, indent=1)
