import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from engine.quickstart.comparisons import write_comparisons
from engine.quickstart.files import find_files
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from recipes.quickstart import config as recipe


class FromAList:
    """Stands for the SFT model: gives texts to prompts, and notes what it was asked."""

    def __init__(self, parallel: Parallel, texts: Callable[[list[str]], list[str]]) -> None:
        self.parallel = parallel
        self.texts = texts
        self.asked: list[str] = []

    def load(self, stage: str, kind: str) -> None:
        assert (stage, kind) == ("sft", "language")

    def prompts(self, texts: list[str]) -> list[str]:
        return texts

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
