from pathlib import Path

import pytest
import torch

from engine.checkpoints.weights import load_weights
from engine.errors import UserError
from engine.ranks.parallel import Parallel
from tests.engine.checkpoints.small_runs import saved, training, weights
from tests.tiny import random_network


def test_language_model_loads_into_a_scalar_trunk_and_leaves_the_head(
    parallel: Parallel, tmp_path: Path
):
    policy = random_network("language", parallel, seed=4)
    saved(policy, tmp_path, "policy")
    scalar = random_network("scalar", parallel, seed=5)
    before = weights(scalar)
    load_weights(scalar, tmp_path, role="policy")
    after, trunk = weights(scalar), weights(policy)
    heads = {"scalar_head.weight", "scalar_head.bias"}
    assert after.keys() == trunk.keys() | heads
    assert all(torch.equal(after[name], trunk[name]) for name in trunk)
    assert all(torch.equal(after[name], before[name]) for name in heads)


def test_scalar_network_loads_with_its_head(parallel: Parallel, tmp_path: Path):
    reward_model = random_network("scalar", parallel, seed=4)
    saved(reward_model, tmp_path, "reward_model")
    critic = random_network("scalar", parallel, seed=5)
    load_weights(critic, tmp_path, role="reward_model")
    for name, weight in weights(reward_model).items():
        assert torch.equal(weights(critic)[name], weight)


def test_reward_model_is_no_language_model(parallel: Parallel, tmp_path: Path):
    saved(random_network("scalar", parallel), tmp_path, "reward_model")
    with pytest.raises(UserError, match="holds a reward model or critic where a language model"):
        load_weights(random_network("language", parallel), tmp_path, role="reward_model")


def test_frozen_masters_follow_loaded_weights(parallel: Parallel, tmp_path: Path):
    saved(random_network("language", parallel, seed=4), tmp_path, "policy")
    run = training(tmp_path / "other", parallel, seed=5)
    load_weights(run.optimizer.network, tmp_path, role="policy")
    run.optimizer.adopt_weights()
    for parameter, bounds, master in run.optimizer.owned_masters():
        assert torch.equal(parameter.detach().flatten()[bounds], master)
