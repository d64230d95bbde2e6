"""The quickstart from files, tiny: two ranks, a second start, and errors before any work."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.quickstart.files import find_files
from engine.quickstart.places import render_prompt
from engine.quickstart.run import run, write_comparisons
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from recipes.quickstart import config as recipe
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


class FromAList:
    """Stands for the SFT model: gives texts to prompts, and notes what it was asked."""

    def __init__(self, parallel: Parallel, texts: Callable[[list[str]], list[str]]) -> None:
        self.parallel = parallel
        self.texts = texts
        self.asked: list[str] = []

    def load(self, stage: str, kind: str) -> None:
        assert (stage, kind) == ("sft", "language")

    def answer(self, policy: None, prompts: list[str], on_answer: Callable[[], None]) -> tuple:
        self.asked = prompts
        for _ in prompts:
            on_answer()
        return None, self.texts(prompts)


def compared(home: Path, texts: Callable[[list[str]], list[str]]) -> tuple[list[str], list[dict]]:
    """Return what the SFT model was asked for 30 prompts, and the comparisons made of its texts."""
    config = dataclasses.replace(recipe, directory=home, num_compared=30)
    files = find_files(config)
    files.comparisons.parent.mkdir(parents=True)
    sampler = FromAList(start_parallel(ParallelLayout(), seed=0), texts)
    write_comparisons(config, files, sampler)  # type: ignore[arg-type]
    paths = (files.comparisons_valid, files.comparisons)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert len(rows[0]) == len(rows[0] + rows[1]) // 10  # a tenth is held out
    return sampler.asked, rows[0] + rows[1]


def test_four_to_nine_completions_of_a_prompt_are_compared(tmp_path: Path):
    asked, rows = compared(tmp_path, lambda prompts: [p[: 5 * n] for n, p in enumerate(prompts)])
    repeats = [len(list(group)) for _, group in itertools.groupby(asked)]
    assert repeats == [4, 5, 6, 7, 8, 9] * 5  # K, paper C.2
    assert rows
    for row in rows:
        assert len(row["completions"]) == len(row["ranks"])
        assert len(set(row["ranks"])) > 1
    # Only the very first text was empty, and is not compared.
    first = next(row for row in rows if row["prompt"] == asked[0])
    assert len(first["completions"]) == 3


def test_prompts_whose_completions_tie_say_nothing(tmp_path: Path):
    _, rows = compared(tmp_path, lambda prompts: ["the same"] * len(prompts))
    assert rows == []


def test_comparisons_of_an_earlier_start_are_kept(tmp_path: Path):
    compared(tmp_path / "run", lambda prompts: [p[: n % 90] for n, p in enumerate(prompts)])
    config = dataclasses.replace(recipe, directory=tmp_path / "run", num_compared=30)
    files = find_files(config)
    before = files.comparisons.read_bytes()
    write_comparisons(config, files, None)  # type: ignore[arg-type]  # nobody is asked
    assert files.comparisons.read_bytes() == before
