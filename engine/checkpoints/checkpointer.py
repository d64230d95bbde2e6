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
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoints.found import check_description, description_in
from engine.checkpoints.shards import (
    adopt,
    owned_parts,
    read_state,
    sharded_optimizer,
    sharded_weights,
    without_tensors,
    write_state,
)
from engine.checkpoints.weights import not_finite_message
from engine.errors import UserError
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.training.ema import EMA
from engine.training.finite import check_finite
from engine.training.network import Network
from engine.training.optimizer import Optimizer


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
        state = sharded_weights(network)
        if optimizer is not None:
            state["optimizer"] = sharded_optimizer(optimizer, state)
            state["optimizer"] |= optimizer.counts()
        if ema is not None:
            # In the weights' place, so that it loads as a network; modules' other state stays.
            parts = owned_parts(state, ema.owned_shadows())
            state = {"average": parts, **without_tensors(state)}
        write_state(state, folder, network)
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
        state = sharded_weights(network)
        if optimizer is not None:
            state["optimizer"] = sharded_optimizer(optimizer, state)
        loaded = read_state(state, folder, network)
        adopt(network, loaded)
        check_finite(network, not_finite_message(folder))
        if optimizer is not None:
            optimizer.load_state(loaded["optimizer"])

    def _load_ema(self, folder: Path) -> None:
        assert self.ema is not None
        network = self.ema.optimizer.network
        parts = owned_parts(sharded_weights(network), self.ema.owned_shadows())
        read_state({"average": parts}, folder, network)

    def _remove_old(self, newest: Path) -> None:
        complete = sorted(
            p for p in self.directory.glob("step_*") if not p.name.endswith(".partial")
        )
        for old in complete[: -self.keep]:
            if old != newest:
                shutil.rmtree(old)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
