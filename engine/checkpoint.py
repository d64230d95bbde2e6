"""Save, load and resume over megatron's distributed checkpoints, which any layout can read.

    RUN/checkpoints/latest               the name of the newest complete checkpoint
    RUN/checkpoints/selected             the name of the one that the run is known by, if not latest
    RUN/checkpoints/step_00000100/
        progress.json                    step, KL coefficient, alarms, ...: what a stage resumes
        from
        policy/                          one network: sharded weights, optimizer state, network.json
        critic/  ema/                    ...
    RUN/checkpoints/epoch_0003/          weights alone, which are kept

A checkpoint is written beside its place and renamed, and `latest` follows last: a run killed while
saving resumes from the one before. Weights load through tensors only, never through pickled code.

Every rank writes and reads its own part of optimizer state and averages, in boxes of the whole
tensors: nothing is gathered. Replicas share the weights: one writes a tensor, one reads it for all.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from engine.boxes import boxes
from engine.config import UserError
from engine.ema import EMA
from engine.finite import check_finite
from engine.found_network import check_description, description_in, network_at
from engine.network import Network
from engine.optimizer import Optimizer, Owned
from engine.parallel import Parallel, said_by_first_rank

# Through this queue megatron's writer hands what it wrote to the rank that waits for it. Its own
# is served by one more process a rank, which imports the recipe anew; ours writes and waits in one
# process, where a plain queue does.
filesystem_async._results_queue = queue.Queue()


@dataclasses.dataclass(kw_only=True)
class Checkpointer:
    """The checkpoints of one run: which networks and numbers they hold, where, and how many are
    kept."""

    directory: Path
    parallel: Parallel
    networks: dict[str, Network]
    optimizers: dict[str, Optimizer]
    ema: EMA | None = None
    keep: int = 2
    tokenizer_fingerprint: str = ""

    def save(self, step: int, progress: dict[str, Any]) -> Path:
        """Write checkpoint `step` with every rank's shards and the progress; return its folder.

        UserError, and nothing written, where weights are not finite.
        """
        self._check_finite()
        with self._whole(f"step_{step:08d}") as folder:
            for role, network in self.networks.items():
                self._save_network(folder / role, network, self.optimizers.get(role))
            if self.ema is not None:
                self._save_network(folder / "ema", self.ema.optimizer.network, None, self.ema)
            if self.parallel.is_writer:
                text = json.dumps({"step": step, **progress}, indent=1)
                (folder / "progress.json").write_text(text)
        final = self.directory / f"step_{step:08d}"
        if self.parallel.is_writer:
            _write_atomically(self.directory / "latest", final.name)
            self._remove_old(final)
        dist.barrier()
        return final

    def save_weights(self, name: str) -> None:
        """Write checkpoint `name` with the networks' weights alone; it is kept, and not resumed
        from. UserError, and nothing written, where weights are not finite."""
        self._check_finite()
        with self._whole(name) as folder:
            for role, network in self.networks.items():
                self._save_network(folder / role, network, None)

    def select(self, name: str) -> None:
        """Make `name` the checkpoint that whoever is given the run's folder loads, in place of the
        newest."""
        if self.parallel.is_writer:
            _write_atomically(self.directory / "selected", name)
        dist.barrier()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint that the first rank sees into the networks and optimizers;
        return its progress, None if there is none."""
        found = json.loads(said_by_first_rank(self._newest))
        if found is None:
            return None
        folder, progress = self.directory / found["name"], found["progress"]
        for role, network in self.networks.items():
            self._load_network(folder / role, network, self.optimizers.get(role))
        if self.ema is not None:
            self._load_ema(folder / "ema")
        return progress

    def _newest(self) -> str:
        latest = self.directory / "latest"
        if not latest.exists():
            return "null"
        name = latest.read_text().strip()
        try:
            progress = json.loads((self.directory / name / "progress.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{latest} names the checkpoint {name!r}, whose progress.json cannot be read "
                f"({error}): write the name of another one of that folder into it, or begin in a "
                "new directory"
            ) from None
        return json.dumps({"name": name, "progress": progress})

    def _check_finite(self) -> None:
        for role, network in self.networks.items():
            shadows = self.ema.shadows if self.ema and self.ema.optimizer.network is network else ()
            check_finite(
                network,
                f"the weights of the {role} are not finite, and are not saved: the run goes no "
                f"further. What was saved before in {self.directory} stays; lower the learning "
                "rate, or use bf16 or fp32 in place of fp16",
                shadows,
            )

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """Yield a folder that all ranks write into, and that becomes checkpoint `name` when they
        are through."""
        final, partial = self.directory / name, self.directory / f"{name}.partial"
        if self.parallel.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        yield partial
        dist.barrier()
        if self.parallel.is_writer:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def _save_network(
        self, folder: Path, network: Network, optimizer: Optimizer | None, ema: EMA | None = None
    ) -> None:
        if self.parallel.is_writer:
            folder.mkdir(parents=True)
        dist.barrier()
        state = _sharded_weights(network)
        if optimizer is not None:
            state["optimizer"] = _sharded_optimizer(optimizer, state)
            state["optimizer"] |= optimizer.counts()
        if ema is not None:
            # In the weights' place, so that it loads as a network; modules' other state stays.
            parts = _parts(state, ema.owned_shadows())
            state = {"average": parts, **_without_tensors(state)}
        _write(state, folder, network)
        if self.parallel.is_writer:
            description = {
                "kind": network.kind,
                "size": dataclasses.asdict(network.size),
                "tokenizer": self.tokenizer_fingerprint,
            }
            (folder / "network.json").write_text(json.dumps(description, indent=1))

    def _load_network(self, folder: Path, network: Network, optimizer: Optimizer | None) -> None:
        description = json.loads(said_by_first_rank(lambda: json.dumps(description_in(folder))))
        check_description(description, folder, network, self.tokenizer_fingerprint)
        state = _sharded_weights(network)
        if optimizer is not None:
            state["optimizer"] = _sharded_optimizer(optimizer, state)
        loaded = _read(state, folder, network)
        _adopt(network, loaded)
        check_finite(network, _broken(folder))
        if optimizer is not None:
            optimizer.load_state(loaded["optimizer"])

    def _load_ema(self, folder: Path) -> None:
        assert self.ema is not None
        network = self.ema.optimizer.network
        parts = _parts(_sharded_weights(network), self.ema.owned_shadows())
        _read({"average": parts}, folder, network)

    def _remove_old(self, newest: Path) -> None:
        complete = sorted(
            p for p in self.directory.glob("step_*") if not p.name.endswith(".partial")
        )
        for old in complete[: -self.keep]:
            if old != newest:
                shutil.rmtree(old)


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
    state = _sharded_weights(network)
    if network.kind == "scalar" and description["kind"] == "language":
        state = {
            chunk: {k: v for k, v in tensors.items() if not k.startswith("scalar_head.")}
            for chunk, tensors in state.items()
        }
    _adopt(network, _read(state, folder, network), strict=False)
    check_finite(network, _broken(folder))


def _broken(folder: Path) -> str:
    return f"{folder}: weights that are not finite; take an earlier checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Where a rank's part of a tensor lies in the whole one, as a checkpoint has it."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_written: bool
    """Whether this rank writes the part; others hold it too and only read it."""


def shards_of(network: Network) -> list[Shard]:
    """Return this rank's parts of the network's tensors.

    A tensor of every layer is one tensor in the checkpoint, the layer its first dimension.
    """
    return [
        Shard(
            name=tensor.key,
            global_shape=tuple(tensor.global_shape),
            offset=tuple(tensor.global_offset),
            shape=(1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
            is_written=is_main_replica(tensor.replica_id),
        )
        for tensor in _sharded_tensors(_sharded_weights(network))
    ]


def _sharded_weights(network: Network) -> dict[str, Any]:
    network.settle()
    with network.parallel.active():
        return {
            f"chunk{stage}": module.sharded_state_dict()
            for stage, module in enumerate(network.modules)
        }


def _sharded_optimizer(optimizer: Optimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the fp32 masters and moments that this rank owns, under the names of megatron's
    `fully_reshardable` form, which would join the state of all data-parallel ranks on each."""
    state = {
        name: _parts(weights, owned, prefix=f"optimizer.state.{name}.")
        for name, owned in optimizer.owned_state().items()
    }
    return {"param_state": state}


def _parts(
    weights: dict[str, Any], owned: list[Owned], prefix: str = ""
) -> dict[str, ShardedTensor]:
    """Return what this rank owns of tensors that are cut up as the weights are, as boxes of the
    whole tensors; they share the owned tensors' memory."""
    weight_of = {weight.data: weight for weight in _sharded_tensors(weights)}
    found: dict[str, ShardedTensor] = {}
    for parameter, bounds, owned_tensor in owned:
        weight, position = weight_of[parameter], 0
        stacked = weight.prepend_axis_num  # dimensions of the whole alone: the layer's
        for offset, shape in boxes(weight.local_shape, bounds.start, bounds.stop):
            count = math.prod(shape)
            data = owned_tensor[position : position + count].view((1,) * stacked + shape)
            position += count
            begins = zip(weight.global_offset, (0,) * stacked + offset, strict=True)
            found[str(len(found))] = dataclasses.replace(
                weight,
                key=prefix + weight.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=tuple(whole + part for whole, part in begins),
                axis_fragmentations=None,  # boxes are no regular grid
                prepend_axis_num=0,
                replica_id=(*weight.replica_id[:2], 0),  # pp and tp may hold it too, dp does not
            )
    return found


def _write(state: dict[str, Any], folder: Path, network: Network) -> None:
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    group = network.parallel.replica_group
    shared = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(state, str(folder), sharded_strategy=shared)


def _read(state: dict[str, Any], folder: Path, network: Network) -> dict[str, Any]:
    """Fill the tensors that the state describes, each in its place; return the state with them."""
    group = network.parallel.replica_group
    shared = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    return dist_checkpointing.load(state, str(folder), sharded_strategy=shared)


def _sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    return [
        v for tensors in state.values() for v in tensors.values() if isinstance(v, ShardedTensor)
    ]


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {
        chunk: {name: v for name, v in entries.items() if not isinstance(v, ShardedTensor)}
        for chunk, entries in state.items()
    }


def _adopt(network: Network, loaded: dict[str, Any], *, strict: bool = True) -> None:
    for stage, module in enumerate(network.modules):
        module.load_state_dict(loaded[f"chunk{stage}"], strict=strict)
    network.mark_changed()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
