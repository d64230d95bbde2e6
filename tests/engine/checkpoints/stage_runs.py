"""Finished runs of the three stages, and what resumes from their checkpoints in this process."""

import contextlib
import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.retention import step_name
from engine.checkpoints.weights import load_weights
from engine.data.tokenizer import load_tokenizer
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.saving import SaveConfig
from engine.training.ema import EMA
from engine.training.network import Network, build_network
from engine.training.optimizer import Optimizer
from models.sizes import Kind
from tests.tiny import ADAM, EVERY_STEP, SIZE, ppo_config, rm_config, sft_config, train

KINDS: dict[str, Kind] = {
    "policy": "language",
    "ema": "language",
    "critic": "scalar",
    "reward_model": "scalar",
}
ROLES = {"sft": ("policy",), "rm": ("reward_model",), "ppo": ("policy", "critic", "ema")}
SECONDS = 60  # of one case: what takes longer, waits for something


def finish_stages(files: Path, folder: Path) -> Path:
    """Run the three stages with a checkpoint a step, of which two are left: folder/{sft,rm,ppo}."""
    train(sft_config(files, folder / "sft", saving=EVERY_STEP, save_every_epoch=True))
    train(rm_config(files, folder / "rm", saving=EVERY_STEP))
    train(ppo_config(files, folder / "ppo", saving=EVERY_STEP))
    return folder


@dataclasses.dataclass(kw_only=True)
class Resumer:
    """The networks of a stage, and a copy of its finished run that may be damaged."""

    stage: str
    run: Path
    step: int
    """Of its newest checkpoint."""
    checkpointer: Checkpointer
    alone: dict[str, Network]
    """By role: a network that loads weights alone."""

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def newest(self) -> Path:
        return self.checkpoints / step_name(self.step)

    @property
    def before(self) -> Path:
        return self.checkpoints / step_name(self.step - 1)

    def files(self) -> list[Path]:
        """The files of the newest checkpoint."""
        return sorted(path for path in self.newest.rglob("*") if path.is_file())

    def tensors(self) -> list[torch.Tensor]:
        """Weights, masters, moments, averages: the memory itself."""
        found = [
            p.detach()
            for n in self.checkpointer.networks.values()
            for p in n.modules[0].parameters()
        ]
        found += [
            t.detach() for o in self.checkpointer.optimizers.values() for t in o.state_tensors()
        ]
        return found + (self.checkpointer.ema.shadows if self.checkpointer.ema else [])

    def resume(self, *, strict: bool = False) -> dict[str, Any] | None:
        """Resume, at most SECONDS long, into networks that have none of the numbers."""
        for tensor in self.tensors():
            tensor.fill_(7.0)
        saving = SaveConfig(save_in_background=False, strict=strict)
        with limited():
            return dataclasses.replace(self.checkpointer, saving=saving).resume()

    def load(self, role: str, source: Path | None = None, *, strict: bool = False) -> torch.Tensor:
        """Load a network's weights alone, at most SECONDS long; return them."""
        network = self.alone[role]
        parameters = [p.detach() for p in network.modules[0].parameters()]
        for parameter in parameters:
            parameter.fill_(7.0)
        with limited():
            load_weights(network, source or self.run, role=role, strict=strict)
        return torch.cat([p.flatten() for p in parameters])


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """End a block with an error where it waits."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it waited for {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def resumer(stage: str, finished: Path, files: Path, folder: Path) -> Resumer:
    """Return what resumes from a copy of a stage's run in a folder."""
    shutil.copytree(finished / stage, folder / stage)
    parallel = start_parallel(ParallelLayout(), seed=1)
    networks = {role: network_of(role, parallel) for role in ROLES[stage] if role != "ema"}
    optimizers = {role: Optimizer(n, ADAM, total_steps=3) for role, n in networks.items()}
    checkpointer = Checkpointer(
        directory=folder / stage / "checkpoints",
        parallel=parallel,
        networks=networks,
        optimizers=optimizers,
        ema=EMA(optimizers["policy"], 0.9) if "ema" in ROLES[stage] else None,
        tokenizer_fingerprint=load_tokenizer(files / "tokenizer.json").fingerprint(),
    )
    return Resumer(
        stage=stage,
        run=folder / stage,
        step=int((folder / stage / "checkpoints" / "latest").read_text().removeprefix("step_")),
        checkpointer=checkpointer,
        alone={role: network_of(role, parallel) for role in ROLES[stage]},
    )


def network_of(role: str, parallel: Parallel) -> Network:
    return build_network(KINDS[role], SIZE, parallel, numerics=Numerics())
