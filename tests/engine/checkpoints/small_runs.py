"""Small networks, alone or in training, and the runs that they are saved as."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from engine.checkpoints.checkpointer import Checkpointer
from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.settings.adam import AdamConfig
from engine.settings.saving import SaveConfig
from engine.training.ema import EMA
from engine.training.network import Network
from engine.training.optimizer import Optimizer, StepResult
from engine.training.passes import forward_backward
from tests.tiny import random_network


@dataclasses.dataclass(kw_only=True)
class Training:
    """A policy in training, its average, and where both are saved."""

    optimizer: Optimizer
    ema: EMA
    checkpointer: Checkpointer

    def step(self, position: int, *, scale: float = 1.0) -> StepResult:
        """Train on a batch of the position's own."""
        tokens = np.random.default_rng(position).integers(0, 100, 40)
        batch = pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)
        self.optimizer.zero_gradients()
        network = self.optimizer.network
        forward_backward(network, [batch], NegativeLogLikelihood(39), scale=scale)
        result = self.optimizer.step(position)
        self.ema.update()
        return result

    def tensors(self) -> list[torch.Tensor]:
        """Weights, masters and the average."""
        weights = [p.detach().clone() for p in self.optimizer.network.modules[0].parameters()]
        masters = [master.clone() for _, _, master in self.optimizer.owned_masters()]
        return weights + masters + [shadow.clone() for shadow in self.ema.shadows]


def training(
    directory: Path, parallel: Parallel, *, dtype: str = "fp32", seed: int = 0
) -> Training:
    network = random_network("language", parallel, dtype=dtype, seed=seed)
    optimizer = Optimizer(network, AdamConfig(lr=1e-3), total_steps=10)
    ema = EMA(optimizer, 0.9)
    checkpointer = Checkpointer(
        directory=directory,
        parallel=parallel,
        saving=SaveConfig(save_in_background=False),
        networks={"policy": network},
        optimizers={"policy": optimizer},
        ema=ema,
        tokenizer_fingerprint="a tokenizer",
    )
    return Training(optimizer=optimizer, ema=ema, checkpointer=checkpointer)


def checkpointer_of(
    network: Network, directory: Path, role: str = "policy", fingerprint: str = ""
) -> Checkpointer:
    """What saves a network by itself, without an optimizer."""
    return Checkpointer(
        directory=directory,
        parallel=network.parallel,
        saving=SaveConfig(save_in_background=False),
        networks={role: network},
        optimizers={},
        tokenizer_fingerprint=fingerprint,
    )


def saved(network: Network, directory: Path, role: str, fingerprint: str = "") -> Path:
    """Save a network as a run of its own; return the run."""
    checkpointer_of(network, directory / "checkpoints", role, fingerprint).save(1, {})
    return directory


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.modules[0].named_parameters()}
