"""The quickstart from files, tiny: two ranks, a second start, and errors before any work."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.files import find_files, write_tokenizer
from engine.quickstart.judge import preferred
from engine.quickstart.places import demonstrations, fact_lists, render_facts
from engine.quickstart.run import run
from engine.settings.layout import ParallelLayout
from recipes.quickstart import config as recipe
from tests.ranks import run_ranks
from tests.tiny import write_lines


def data_folder(folder: Path) -> Path:
    """Write a user's data folder: a few dozen places, K = 4 completions of each, a little text."""
    for name in ("sft", "comparisons", "prompts", "pretrain"):
        (folder / name).mkdir(parents=True)
    for ending, split, count in (("train", "train", 60), ("val", "valid", 8)):
        pairs = demonstrations(split, count, seed=0)
        write_lines(
            folder / f"sft/e2e.{ending}.jsonl", ({"prompt": p, "response": r} for p, r in pairs)
        )
        write_lines(
            folder / f"comparisons/e2e.{ending}.jsonl",
            (
                {"prompt": p, "completions": [r, r[:20], r[:9], "no"], "ranks": [1, 2, 3, 4]}
                for p, r in pairs
            ),
        )
        facts = fact_lists("prompts" if ending == "train" else "valid", 12, seed=1)
        write_lines(
            folder / f"prompts/e2e.{ending}.jsonl", ({"prompt": render_facts(f)} for f in facts)
        )
        text = "\n".join(json.dumps({"text": f"the river near the mill {n}"}) for n in range(400))
        (folder / f"pretrain/{ending}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def tiny_config(home: Path, data: Path, **changes):
    """Return the recipe's config, cut down to seconds."""
    ppo = dataclasses.replace(
        recipe.ppo,
        iterations=2,
        rollout_batch_size=8,
        minibatch_size=4,
        sampling=dataclasses.replace(recipe.ppo.sampling, max_new_tokens=8),
        data=dataclasses.replace(recipe.ppo.data, pretraining_tokens=32),
    )
    pretrain = dataclasses.replace(
        recipe.pretrain, data=dataclasses.replace(recipe.pretrain.data, pretraining_tokens=32)
    )
    return dataclasses.replace(
        recipe,
        directory=home,
        data=data,
        vocab_size=400,
        num_pretraining_tokens=2_000,
        num_demonstrations=60,
        num_judged=6,
        pretrain=pretrain,
        ppo=ppo,
        **changes,
    )


def start(home: Path, data: Path, layout: ParallelLayout) -> dict:
    return run(tiny_config(home, data, layout=layout))


@pytest.mark.slow  # every stage, twice
def test_two_ranks_run_the_recipe_and_a_second_start_only_judges(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    prompts = data / "prompts/e2e.val.jsonl"
    too_long = render_facts({"name": "Blue Spice " * 200})  # leaves no room and is not judged
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


def test_a_missing_file_is_named_before_anything_is_trained(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    (data / "comparisons/e2e.val.jsonl").unlink()
    with pytest.raises(UserError, match=r"data: no file matches comparisons/e2e\*\.val\.jsonl\*"):
        find_files(tiny_config(tmp_path / "run", data))


def test_files_of_another_task_are_not_taken(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    with pytest.raises(UserError, match=r"no file matches sft/chat\*\.train"):
        find_files(tiny_config(tmp_path / "run", data, task="chat"))


def test_a_bad_line_of_pretraining_text_is_named_by_the_tokenizers_training(tmp_path: Path):
    config = tiny_config(tmp_path / "run", data_folder(tmp_path / "data"))
    files = find_files(config)
    files.pretraining.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl\.gz:2: field \"text\" is missing"):
        write_tokenizer(config, files, tmp_path / "tokenizer.model")


def test_preferred_splits_ties():
    won = preferred([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.0])
    assert won["win_rate_vs_sft"] == pytest.approx(2.5 / 4)
    low, high = won["win_rate_interval"]
    assert low < 2.5 / 4 < high
