import math
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.run import changed_setting
from engine.settings.command_line import parse_config
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import save_config
from engine.settings.sft import SFTConfig
from engine.settings.spikes import SpikeConfig


def test_by_default_every_step_is_taken():
    assert SpikeConfig().policy == "none"
    for config in (SFTConfig(), RMConfig(), PPOConfig()):
        assert config.spikes == SpikeConfig()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("norm_factor", [0.0, -1.0, 1.0, 0.5, math.nan, math.inf]),
        ("loss_factor", [-1.0, 1.0, 0.5, math.nan, math.inf]),
        ("window", [0, -1]),
        ("warmup", [0, -1, 129]),
        ("max_in_a_row", [0]),
        ("extra_batches", [-1]),
        ("max_rewinds", [0]),
    ],
)
def test_number_that_cannot_be_is_an_error(name: str, values: list):
    for value in values:
        with pytest.raises(UserError, match=f"spikes.{name.replace('_', '-')} "):
            SpikeConfig(**{name: value})


def test_other_policies_are_refused_with_those_there_are():
    with pytest.raises(UserError, match="'none', 'skip', 'rewind'"):
        parse_config(SFTConfig(), ["--spikes.policy", "ignore"])


def test_run_may_go_on_with_other_ones(tmp_path: Path):
    config = SFTConfig()
    save_config(config, tmp_path / "config.json")
    words = ["--spikes.policy", "rewind", "--spikes.norm-factor", "5", "--spikes.window", "32"]
    words += ["--numerics.compare-every", "3", "--numerics.deterministic"]
    changed = parse_config(config, [*words, "--numerics.recheck-every", "2"])
    assert changed.spikes == SpikeConfig(policy="rewind", norm_factor=5.0, window=32)
    assert changed_setting(changed, tmp_path / "config.json") is None
