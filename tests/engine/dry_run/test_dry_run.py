"""Every recipe passes its dry run; a job that does not fit stops with a line that says why."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from engine.dry_run.dry_run import check_batches, chosen_gpus, dry_run, models_of
from engine.errors import UserError
from engine.planning.sizes import named_sizes, sizes_at
from engine.ranks.start import end_parallel
from engine.recipe import run_stage
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from models.sizes import SIZES
from tests.families import CONFIGS

ROOT = Path(__file__).parents[3]
STAGES = ("sft", "init", "rm", "ppo")
NUM_GPUS = {"tiny": 4, "1_3b": 64, "6b": 256, "175b": 1024}
SLOW = {"6b", "175b"}
CRITIC_DP8 = {"layout": ParallelLayout(tp=8), "critic_layout": ParallelLayout()}


@pytest.fixture(autouse=True)
def alone():
    """Leave the world of one that other tests of this process may have joined."""
    end_parallel()


def config_of(name: str):
    config = runpy.run_path(str(ROOT / f"recipes/{name}.py"))["config"]
    if name == "ppo_tiny":  # its sizes are those of its checkpoints
        config = dataclasses.replace(config, size="tiny", reward_model_size="tiny")
    return config


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{stage}_{size}", marks=[pytest.mark.slow] if size in SLOW else [])
        for size in NUM_GPUS
        for stage in STAGES
    ],
)
def test_every_recipe_passes(capsys, name):
    dry_run(config_of(name), NUM_GPUS[name.partition("_")[2]])
    assert "every check passed" in capsys.readouterr().out


@pytest.mark.slow
def test_175b_on_a_thousand_gpus_takes_little_memory():
    command = [sys.executable, "recipes/ppo_175b.py", "--dry-run", "1024"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss < 4e6  # KiB


def test_dry_run_is_an_option_of_every_stage(capsys):
    config = config_of("sft_tiny")
    run_stage(pytest.fail, config, ["--dry-run", "4", "--layout.tp", "2"])
    assert "tp 2 x pp 1 x dp 2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_stage(pytest.fail, config, ["--dry-run", "4", "--layout.tp", "3"])
    assert stop.value.code == 2
    assert "layout tp 3 x pp 1 x cp 1 = 3 must divide" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "gpus", "layout"),
    [
        # The recipe says that 8 GPUs run it, and its layout is tp 2.
        (["--dry-run"], "checked on 8 GPUs, those of the launch", "tp 2 x pp 1 x dp 4"),
        (
            ["--dry-run", "--layout.tp", "4"],
            "checked on 8 GPUs, those of the",
            "tp 4 x pp 1 x dp 2",
        ),
        (["--layout.pp=8", "--dry-run"], "checked on 16 GPUs, the fewest", "tp 2 x pp 8 x dp 1"),
        (["--dry-run", "64"], None, "tp 2 x pp 1 x dp 32"),
        (["--dry-run=64"], None, "tp 2 x pp 1 x dp 32"),
    ],
)
def test_without_a_number_a_recipe_is_checked_as_it_is_launched(options, gpus, layout):
    done = subprocess.run(
        [sys.executable, "recipes/init_1_3b.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(gpus or "batch: ")
    assert any(layout in line for line in lines)
    assert "every check passed" in done.stdout


def test_fewest_gpus_are_those_that_all_layouts_divide():
    config = dataclasses.replace(
        config_of("ppo_tiny"),
        layout=ParallelLayout(tp=2, pp=3),
        critic_layout=ParallelLayout(pp=4),
        generation_layout=ParallelLayout(tp=8),
    )
    assert chosen_gpus(config, None)[0] == 24
    assert chosen_gpus(config, 48)[0] == 48
    assert chosen_gpus(config, 32)[0] == 24
    assert chosen_gpus(config_of("sft_tiny"), None)[0] == 1


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", "4 8"])
def test_bad_number_of_gpus_is_an_error_in_a_line(capsys, number: str):
    with pytest.raises(SystemExit) as stop:
        run_stage(pytest.fail, config_of("sft_tiny"), ["--dry-run", *number.split(" ")])
    assert stop.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"error: --dry-run takes a number of GPUs, at least 1, or none; got {number!r}\n",
    )


def test_other_recipes_have_no_dry_run(capsys):
    with pytest.raises(SystemExit):
        run_stage(pytest.fail, config_of("sft_tiny"), ["--dry-run", "4"], has_dry_run=False)
    assert "Unrecognized options: --dry-run" in capsys.readouterr().err


def test_other_ranks_of_the_launch_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_stage(pytest.fail, config_of("sft_tiny"), ["--dry-run", "4"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": ParallelLayout(tp=8)}, "policy and reference: --layout.tp 8 must divide"),
        (
            {"critic_layout": ParallelLayout(pp=8)},
            "critic and reward model: --layout.pp 8 .* must",
        ),
        ({"layout": ParallelLayout(tp=3)}, "must divide them"),
        ({"size": "huge"}, "no size is named 'huge'"),
        ({"size": ""}, "a plan needs --size, for --policy runs/init_tiny is not there"),
    ],
)
def test_job_that_does_not_fit_is_refused(changes, message):
    config = dataclasses.replace(config_of("ppo_tiny"), **changes)
    with pytest.raises(UserError, match=message):
        dry_run(config, 8)


def test_layout_that_does_not_fit_is_answered_with_one_that_does(capsys):
    config = config_of("ppo_1_3b")
    with pytest.raises(UserError, match="1 = 3 must divide them.*\nwhat fits 8 x h100") as error:
        dry_run(dataclasses.replace(config, layout=ParallelLayout(pp=3)), 8)
    options = str(error.value).splitlines()[4].split("   ")[-1].split()
    assert options[0].startswith("--")
    run_stage(pytest.fail, config, ["--dry-run", "8", *options])
    assert "every check passed" in capsys.readouterr().out


def test_run_that_needs_more_memory_is_refused_after_its_plan(capsys):
    config = dataclasses.replace(config_of("sft_1_3b"), layout=ParallelLayout(), batch_size=1)
    config = dataclasses.replace(config, micro_batch_tokens=2048, size="6b")
    with pytest.raises(UserError, match="does not fit 1 x h100.*\nno layout fits: take more"):
        dry_run(config, 1)
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "changes", "data", "message"),
    [
        ("ppo", {"rollout_batch_size": 36, "minibatch_size": 12}, {}, "multiple of dp 8"),
        ("ppo", {"minibatch_size": 4} | CRITIC_DP8, {}, "of the critic's dp 8"),
        ("ppo", {"micro_batch_tokens": 200}, {}, "micro-batch-tokens 200 must be at least 224"),
        ("ppo", {}, {"max_prompt_tokens": 200}, "200 .* 96 = 296 exceed the context of 256"),
        ("ppo", {}, {"pretraining_tokens": 512}, "data.pretraining-tokens 512 is more than"),
        ("sft", {"batch_size": 12}, {}, "batch-size 12 must be a multiple of dp 8"),
        ("sft", {}, {"max_tokens": 512}, "data.max-tokens 512 is more than"),
        ("sft", {}, {"max_prompt_tokens": 256}, "leaves no room for a response"),
        ("init", {}, {"pretraining_tokens": 512}, "data.pretraining-tokens 512 is more than"),
        ("rm", {"micro_batch_tokens": 128}, {}, "micro-batch-tokens 128 must be at least 256"),
    ],
)
def test_batch_that_does_not_fit_is_refused(stage, changes, data, message):
    config = config_of(f"{stage}_tiny")
    changes = changes | {"data": dataclasses.replace(config.data, **data)}
    config = dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=message):
        check_batches(config, named_sizes(config), 8)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("sft", "--data.max-tokens 1024 is more than the context of 64 tokens, which counts"),
        ("rm", "--data.max-tokens 1024 is more than the context of 64 tokens, which counts"),
        ("ppo", "prompts over 48 tokens are dropped: the context has 64"),
    ],
)
def test_the_context_of_a_model_that_is_there_counts(stage, said, tmp_path):
    config, short = config_of(f"{stage}_hf"), SamplingConfig(max_new_tokens=16)
    config = dataclasses.replace(config, **({"sampling": short} if stage == "ppo" else {}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    start = {"policy" if stage == "ppo" else "init_from": tmp_path}
    config = dataclasses.replace(config, directory=tmp_path / "run", **start)
    assert said in check_batches(config, sizes_at(config), 8)


def test_generation_in_a_layout_of_its_own_is_built_too(capsys):
    config = dataclasses.replace(
        config_of("ppo_tiny"), layout=ParallelLayout(pp=2), generation_layout=ParallelLayout(tp=2)
    )
    dry_run(config, 4)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("generation: ") and "tp 2 x pp 1 x dp 2" in line for line in lines)
    bad = dataclasses.replace(config, generation_layout=ParallelLayout(tp=8))
    with pytest.raises(UserError, match="generation: --layout.tp 8 must divide"):
        dry_run(bad, 8)
    staged = dataclasses.replace(config, generation_layout=ParallelLayout(pp=4))
    with pytest.raises(UserError, match="generation_layout: .* without pipeline, not to pp 4"):
        dry_run(staged, 4)


def test_batches_are_said_in_words():
    config = config_of("ppo_tiny")
    lines = check_batches(config, named_sizes(config), 8)
    assert lines == [
        "batch: 64 episodes an iteration in 2 updates of 32, 4 a rank (dp 8)",
        "ptx: 32 sequences of 128 tokens an update, 4 a rank",
    ]


def test_roles_of_one_shape_are_built_once():
    config = dataclasses.replace(config_of("ppo_tiny"), reward_model_size="small")
    policy, critic = models_of(config, named_sizes(config))
    assert str(policy) == "policy and reference"
    assert (policy.kind, policy.size) == ("language", SIZES["tiny"])
    assert (critic.kind, critic.size) == ("scalar", SIZES["small"])


def test_critics_layout_that_does_not_divide_the_gpus_is_named():
    config = dataclasses.replace(config_of("ppo_1_3b"), critic_layout=ParallelLayout(tp=2))
    with pytest.raises(UserError, match="^critic and reward model: 3 ranks cannot be split"):
        dry_run(config, 3)
