"""One PPO iteration as a job that any provider can do, and what it has to show for it."""

import dataclasses
import math
import resource
from dataclasses import dataclass

import torch

from engine.settings.numerics import Numerics
from models.sizes import GPTSize


@dataclass(frozen=True, kw_only=True)
class Job:
    """One iteration, its lengths in tokens."""

    size: GPTSize
    critic_size: GPTSize
    numerics: Numerics
    num_episodes: int
    minibatch_size: int
    prompt_tokens: int
    response_tokens: int
    pretraining_tokens: int
    ptx_examples_per_episode: int
    """0: plain PPO."""
    micro_batch_tokens: int

    @property
    def num_response_tokens(self) -> int:
        """Of an iteration."""
        return self.num_episodes * self.response_tokens

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration, of policy and critic each."""
        return self.num_episodes // self.minibatch_size

    def plain(self) -> "Job":
        """Return the same without pretraining text."""
        return dataclasses.replace(self, ptx_examples_per_episode=0)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """When a provider has been timed enough."""

    num_samples: int
    """Iterations after the first."""
    seconds: float = math.inf
    """No further iteration begins after so many seconds of iterations; one is always counted."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a provider did."""

    seconds: list[dict[str, float]]
    """By phase, of each iteration after the first."""
    num_response_tokens: int
    """Of one iteration."""
    num_updates: int
    """Optimizer steps of one iteration."""
    losses: tuple[float, float]
    """Policy's and value's, of the last iteration."""
    kl_per_token: float
    """Between policy and reference in the first iteration, in which they are equal: rounding."""
    peak_bytes: int


def peak_bytes(device: torch.device) -> int:
    """Return the most memory of the device that torch gave out since free_memory; on a CPU the most
    that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
