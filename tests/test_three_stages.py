"""Every stage from the command line, as a user starts it: torchrun and a recipe, on two ranks."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# Every stage in another layout than the one before, whose checkpoint it reads.
LAYOUTS = {
    "sft": [],  # dp 2
    "init": ["--layout.tp", "2", "--layout.sequence-parallel"],
    "rm": [],
    "ppo": ["--layout.pp", "2"],
}
HEADLINES = {
    "sft": "valid/loss",
    "init": "train/pretrain_loss",
    "rm": "valid/pair_accuracy",
    "ppo": "update/ptx_loss",
}


def torchrun(recipe: str, *options: object, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a recipe as the README says, and return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--nproc-per-node={num_ranks}")
    return subprocess.run(
        [*launcher, str(ROOT / "recipes" / recipe), *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow  # four torchruns of two ranks each: half a minute
def test_every_stage_runs_from_the_command_line(tiny: Path, tmp_path: Path):
    runs = {stage: tmp_path / stage for stage in HEADLINES}
    options: dict[str, list[object]] = {
        "sft": ["--tokenizer", tiny / "tokenizer.json"],
        "init": ["--init-from", runs["sft"]],
        "rm": ["--init-from", runs["sft"], "--data.demonstrations", tiny / "demonstrations.jsonl"],
        "ppo": ["--policy", runs["init"], "--reward-model", runs["rm"]],
    }
    texts = tiny / "pretraining.jsonl"
    options["sft"] += ["--data.train", tiny / "demonstrations.jsonl"]
    options["init"] += ["--data.train", tiny / "demonstrations.jsonl", "--data.pretraining", texts]
    options["rm"] += ["--data.train", tiny / "comparisons.jsonl", "--data.valid-fraction", 0.25]
    options["ppo"] += ["--data.prompts", tiny / "prompts.jsonl", "--data.pretraining", texts]
    options["ppo"] += ["--iterations", 2, "--rollout-batch-size", 8, "--minibatch-size", 4]
    options["ppo"] += ["--sampling.max-new-tokens", 8]
    for stage, arguments in options.items():
        done = torchrun(f"{stage}_tiny.py", "--directory", runs[stage], *arguments, *LAYOUTS[stage])
        assert done.returncode == 0, done.stderr
        rows = read_metrics(runs[stage])
        assert len(rows) >= 2
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert HEADLINES[stage] in rows[-1]
        assert f"{stage} {len(rows)}/{len(rows)}" in done.stdout
        latest = (runs[stage] / "checkpoints" / "latest").read_text()
        assert latest == f"step_{len(rows):08d}"


@pytest.mark.slow
def test_pretraining_is_the_case_without_demonstrations(tiny: Path, tmp_path: Path):
    done = torchrun(
        "sft_tiny.py",
        *("--directory", tmp_path / "base", "--tokenizer", tiny / "tokenizer.json"),
        *("--data.pretraining", tiny / "pretraining.jsonl", "--data.pretraining-tokens", 64),
        num_ranks=1,
    )
    assert done.returncode == 0, done.stderr
    losses = [row["train/pretrain_loss"] for row in read_metrics(tmp_path / "base")]
    assert losses[-1] < losses[0]
    assert "train/loss" not in read_metrics(tmp_path / "base")[0]


@pytest.mark.slow
def test_tp_that_does_not_divide_the_heads_is_one_error_of_all_ranks(tiny: Path, tmp_path: Path):
    done = torchrun(
        "sft_tiny.py",
        *("--directory", tmp_path / "run", "--init-from", tiny / "policy"),
        *("--data.train", tiny / "demonstrations.jsonl", "--layout.tp", 3),
        num_ranks=3,
    )
    assert done.returncode != 0
    # torchrun's report repeats it for each rank, as the reason why that one failed.
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: --layout.tp 3 must divide the model's 4 heads"]
    assert str(ROOT / "engine") not in done.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()
