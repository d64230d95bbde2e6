"""The quickstart from files, tiny: two ranks, a second start, and errors before any work."""

import json
from pathlib import Path

import pytest

from engine.quickstart.places import render_prompt
from engine.quickstart.run import run
from engine.settings.layout import ParallelLayout
from tests.engine.quickstart.small_recipe import data_folder, tiny_config
from tests.ranks import run_ranks


def start(home: Path, data: Path, layout: ParallelLayout) -> dict:
    return run(tiny_config(home, data, layout=layout))


@pytest.mark.slow  # every stage, twice
def test_two_ranks_run_the_recipe_and_a_second_start_only_judges(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    prompts = data / "prompts/e2e.val.jsonl"
    too_long = render_prompt({"name": "Blue Spice " * 200})  # leaves no room and is not judged
    prompts.write_text(json.dumps({"prompt": too_long}) + "\n" + prompts.read_text())
    home = tmp_path / "run"
    first = run_ranks(start, 2, home, data, ParallelLayout(tp=2))
    summary = first[0]
    assert json.loads((home / "summary.json").read_text())["ppo"] == json.loads(
        json.dumps(summary["ppo"])
    )
    assert summary["judge"] == "labeler"
    report = (home / "report.html").read_text()
    assert "PPO-ptx" in report
    assert "Blue Spice Blue Spice" not in report
    assert summary["sft"]["win_rate_vs_sft"] == 0.5  # against itself every prompt ties
    assert summary["sft"]["kl_from_init"] == pytest.approx(0.0, abs=1e-4)
    assert summary["ppo"]["pretrain_loss"] > 0

    written = {path: path.stat().st_mtime_ns for path in home.glob("*/checkpoints/latest")}
    assert len(written) == 5
    second = run_ranks(start, 2, home, data, ParallelLayout(tp=2))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for summary in (first[0], second[0]):
        summary.pop("seconds")
    assert second[0] == first[0]
