import dataclasses

import pytest

from engine.errors import UserError
from engine.settings.command_line import parse_config
from engine.settings.ppo import PPOConfig
from engine.settings.residency import ResidencyConfig


def test_nothing_leaves_the_gpu_unless_it_is_told_to():
    places = dataclasses.asdict(ResidencyConfig())
    places.pop("bucket_mib")
    assert places == dict.fromkeys(("reference", "reward_model", "critic", "optimizer"), "resident")


def test_a_bucket_moves_something_and_wastes_no_pinned_memory():
    mib = ResidencyConfig().bucket_mib
    assert mib & (mib - 1) == 0  # a power of two
    with pytest.raises(UserError, match="residency.bucket-mib must be at least 1, got 0"):
        ResidencyConfig(bucket_mib=0)


@pytest.mark.parametrize("role", ["critic", "optimizer"])
def test_what_trains_is_not_sharded_here(role: str):
    with pytest.raises(UserError, match="'resident', 'host'"):
        parse_config(PPOConfig(), [f"--residency.{role}", "sharded"])


@pytest.mark.parametrize("role", ["reference", "reward-model"])
def test_what_is_only_read_may_be(role: str):
    config = parse_config(PPOConfig(), [f"--residency.{role}", "sharded"])
    assert getattr(config.residency, role.replace("-", "_")) == "sharded"
