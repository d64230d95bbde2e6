from pathlib import Path

from engine.settings.command_line import parse_config
from engine.settings.layout import ParallelLayout
from engine.settings.replay import ReplayConfig


def test_layout_is_the_runs_unless_one_is_named():
    found = parse_config(ReplayConfig(), ["--step", "runs/sft/skipped/step_00000012_policy"])
    assert found.step == Path("runs/sft/skipped/step_00000012_policy") and found.layout is None
    named = parse_config(ReplayConfig(), ["--step", "x", "--layout.tp", "2"])
    assert named.layout == ParallelLayout(tp=2)
