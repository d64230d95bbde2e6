"""PPO iterations as a job that any provider can do, and what it has to show for it."""

import dataclasses
import math
import re
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.settings.numerics import Numerics
from models.sizes import GPTSize, size_as_json, size_of_json

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Of a forward pass of every provider, by device; on two cores TRL is fastest so."""
WORKLOADS = ("fixed", "mixed")

Iterations = Sequence[Mapping[str, float]]
"""Of each iteration that is done the seconds by phase."""
GoesOn = Callable[[Iterations], bool]
"""Told of the iterations that are done, before each: whether there is another."""


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
    """Of every response; of the longest where lengths are mixed."""
    pretraining_tokens: int
    ptx_examples_per_episode: int
    """0: plain PPO."""
    micro_batch_tokens: int
    workload: str = "fixed"
    """"fixed": nothing ends a response; "mixed": an end of text does that the model draws
    (ppo_weights.py)."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a response, the vocabulary's last; None where none does."""
        return self.size.vocab_size - 1 if self.workload == "mixed" else None

    @property
    def shortest(self) -> int:
        """Tokens of the shortest response; our choice: 16 where the longest has 128."""
        return self.response_tokens if self.eos_id is None else max(1, self.response_tokens // 8)

    @property
    def hazard(self) -> float:
        """The chance that a token is the end, from the shortest response on; our choice: 1/48 where
        the longest response has 128 tokens, of which most then have less than half."""
        return 8 / (3 * self.response_tokens)

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration, of policy and critic each."""
        return self.num_episodes // self.minibatch_size

    def prompts(self) -> np.ndarray:
        """Return [num_episodes, prompt_tokens] random tokens, the same at every call."""
        num_tokens = self.size.vocab_size if self.eos_id is None else self.eos_id
        shape = (self.num_episodes, self.prompt_tokens)
        return np.random.default_rng(0).integers(0, num_tokens, shape)

    def plain(self) -> "Job":
        """Return the same without pretraining text."""
        return dataclasses.replace(self, ptx_examples_per_episode=0)


def job_as_json(job: Job) -> dict[str, Any]:
    """Return a job as JSON has it."""
    sizes = {name: size_as_json(getattr(job, name)) for name in ("size", "critic_size")}
    return dataclasses.asdict(job) | sizes


def job_from(fields: Mapping[str, Any]) -> Job:
    """Return the job that job_as_json took apart."""
    parts = {
        "size": size_of_json(fields["size"]),
        "critic_size": size_of_json(fields["critic_size"]),
        "numerics": Numerics(**fields["numerics"]),
    }
    return Job(**{**fields, **parts})


@dataclass(frozen=True, kw_only=True)
class Effort:
    """When a provider has been timed enough."""

    num_samples: int
    """Iterations after the first."""
    seconds: float = math.inf
    """No further iteration begins after so many seconds of iterations; one is always counted."""

    def __call__(self, iterations: Iterations) -> bool:
        """Return whether there is another iteration after these."""
        num_counted = len(iterations) - 1
        spent = sum(sum(phases.values()) for phases in iterations)
        return num_counted < self.num_samples and (num_counted < 1 or spent <= self.seconds)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a provider did."""

    seconds: list[dict[str, float]]
    """By phase, of each iteration after the first."""
    lengths: list[list[int]]
    """Tokens of every response, end of text included, of each iteration."""
    num_updates: int
    """Optimizer steps of one iteration."""
    losses: tuple[float, float]
    """Policy's and value's, of the last iteration."""
    kl_per_token: float
    """Between policy and reference in the first iteration, in which they are equal: rounding."""
    before: dict[str, float]
    """What the networks say to the first prompts before anything is trained: the mean log-prob of
    their tokens, and the mean value after them. Equal weights say the same."""
    start_bytes: int
    """Of peak_bytes what interpreter and libraries had taken before there was a model."""
    peak_bytes: int


MOST_ITERATIONS = 1000
"""That a provider is made for; whoever measures ends it before."""
NUM_PROBED = 8
"""Prompts that Measured.before is about; our choice: their logits are no peak of memory."""


def peak_bytes(device: torch.device) -> int:
    """Return the most memory of the device that torch gave out since free_memory; on a CPU the most
    that the process ever held in memory, interpreter and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # On Linux getrusage also counts what the parent held when it started this process.
    if status.exists() and (held := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(held[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
