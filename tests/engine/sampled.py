"""Responses of a random policy to a few prompts of unlike length."""

import numpy as np
import torch

from engine.data.examples import Example
from engine.rollout import Rollout, generate_rollout
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network

EOS = 0
SAMPLING = SamplingConfig(max_new_tokens=12, num_slots=3, cache_gib=0.01)


def prompts() -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = (3, 11, 1, 7, 4, 20, 2, 9)
    return [Example(tokens=draw.integers(1, 100, n), prompt_length=n) for n in lengths]


def sample(policy: Network, **changes: object) -> Rollout:
    arguments = {"eos_id": EOS, "seed": 3, "first_sample_index": 40}
    return generate_rollout(policy, prompts(), SAMPLING, **(arguments | changes))


def tokens_of(rollout: Rollout) -> torch.Tensor:
    """Return the tokens of a rollout, [T]."""
    return torch.from_numpy(np.concatenate([e.tokens for e in rollout.examples]))
