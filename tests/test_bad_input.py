"""What a user can get wrong: one error of one or two lines that names the cause; nothing written.

The stages run in this process, through run_stage as in a recipe. The last test starts a recipe.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from engine import ppo, rm, sft
from engine.checkpoints.manifest import digest_of_file, read_manifest, write_manifest
from engine.metrics import Metrics, plot_curves
from engine.recipe import run_stage
from tests.hostile import dangers
from tests.tiny import (
    ppo_config,
    rm_config,
    rows_of,
    sft_config,
    train,
    write_lines,
    write_tokenizer,
)

ROOT = Path(__file__).parents[1]
STAGES: dict[str, tuple[Callable, Callable]] = {
    "sft": (sft.train, sft_config),
    "rm": (rm.train, rm_config),
    "ppo": (ppo.train, ppo_config),
}


@pytest.fixture
def fails(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(stage, *options) runs a stage that must not run, and returns its error."""

    def run(stage: str, *options: object, directory: Path = tmp_path / "run", **changes) -> str:
        stage_train, config = STAGES[stage]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_stage(stage_train, config(tiny, directory, **changes), [str(o) for o in options])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert len(printed.err.splitlines()) <= 2
        assert "Traceback" not in printed.err + printed.out
        if directory == tmp_path / "run":
            written = [p for p in directory.rglob("*") if p.is_file()]
            # The token file of good pretraining text may be there, whole.
            assert all(p.parent == directory / "tokens" for p in written)
        assert not list(tmp_path.rglob("*.partial"))
        return printed.err

    return run


def line_file(folder: Path, *lines: str) -> Path:
    path = folder / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


DEMONSTRATION = json.dumps({"prompt": "the mill", "response": "is cheap"})
COMPARISON = {"prompt": "the mill", "completions": ["is cheap", "is a pub"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("sft", "--data.train"),
        ("sft", "--data.valid"),
        ("sft", "--data.pretraining"),
        ("sft", "--data.pretraining-valid"),
        ("sft", "--init-from"),
        ("sft", "--tokenizer"),
        ("rm", "--data.train"),
        ("rm", "--data.valid"),
        ("rm", "--data.demonstrations"),
        ("rm", "--init-from"),
        ("ppo", "--data.prompts"),
        ("ppo", "--data.valid"),
        ("ppo", "--data.pretraining"),
        ("ppo", "--data.pretraining-valid"),
        ("ppo", "--policy"),
        ("ppo", "--reference"),
        ("ppo", "--reward-model"),
    ],
)
def test_missing_file(stage: str, option: str, fails: Callable, tmp_path: Path):
    error = fails(stage, option, tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in error


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"prompt": "the mill", "response": "is che', "not one JSON object on one line"),
        ("[1, 2]", "must be one JSON object"),
        (json.dumps({"prompt": "the mill"}), 'field "response" is missing'),
        (json.dumps({"prompt": "the mill", "response": " "}), 'field "response" is empty'),
        (json.dumps({"prompt": "", "response": "is cheap"}), 'field "prompt" is empty'),
        (json.dumps({"prompt": "the mill", "response": 3}), 'field "response" must be a text'),
    ],
)
def test_bad_demonstration(line: str, cause: str, fails: Callable, tmp_path: Path):
    path = line_file(tmp_path, DEMONSTRATION, line, DEMONSTRATION)
    error = fails("sft", "--data.train", path)
    assert f"{path}:2: " in error
    assert cause in error
    assert "--data.skip-bad-lines" in error


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"completions": ["is cheap"], "ranks": [1]}, "needs at least 2 to compare, not 1"),
        ({"ranks": [2, 2]}, "all ties say nothing"),
        ({"completions": ["is cheap", ""]}, 'field "completions[1]" is empty'),
        ({"ranks": [1, 2, 3]}, "has 3 ranks for 2 completions"),
        ({"ranks": [1, "b"]}, 'field "ranks[1]" must be a whole number'),
    ],
)
def test_bad_comparison(change: dict, cause: str, fails: Callable, tmp_path: Path):
    path = line_file(tmp_path, json.dumps(COMPARISON), json.dumps(COMPARISON | change))
    error = fails("rm", "--data.train", path)
    assert f"{path}:2: " in error
    assert cause in error


def test_bad_prompt_and_bad_pretraining_text(fails: Callable, tmp_path: Path):
    path = line_file(tmp_path, json.dumps({"prompt": "the mill"}), json.dumps({"text": "x"}))
    assert f'{path}:2: field "prompt" is missing' in fails("ppo", "--data.prompts", path)
    assert f'{path}:2: field "prompt" is missing' in fails("ppo", "--data.valid", path)
    assert f"{path}:1: has no text" in fails("ppo", "--data.pretraining", path)
    assert f"{path}:1: has no text" in fails("ppo", "--data.pretraining-valid", path)
    assert f"{path}:1: has no text" in fails("sft", "--data.pretraining", path)


def test_bad_lines_are_skipped_on_request(tiny: Path, tmp_path: Path, capsys):
    good = (tiny / "demonstrations.jsonl").read_text().splitlines()
    path = line_file(tmp_path, '{"prompt": ', *good)
    config = sft_config(tiny, tmp_path / "run")
    data = dataclasses.replace(config.data, train=path, skip_bad_lines=True)
    train(dataclasses.replace(config, data=data))
    assert "1 bad lines skipped" in capsys.readouterr().out
    assert rows_of(tmp_path / "run")
    data = dataclasses.replace(config.data, valid=path, skip_bad_lines=True)
    train(dataclasses.replace(config, data=data, directory=tmp_path / "held_out"))
    assert f"{path}: 40 records, 1 bad lines skipped" in capsys.readouterr().out


def test_prompts_over_the_limit(tiny: Path, fails: Callable, tmp_path: Path, capsys):
    for stage, option in (("sft", "demonstrations"), ("rm", "comparisons"), ("ppo", "prompts")):
        error = fails(stage, "--data.max-prompt-tokens", 1)
        assert "examples are too long" in error
        assert "over 1 tokens (--data.max-prompt-tokens)" in error
        # One among good ones is dropped and counted.
        longest = max(
            (tiny / f"{option}.jsonl").read_text().splitlines(),
            key=lambda line: len(json.loads(line)["prompt"]),
        )
        long_prompt = json.loads(longest)["prompt"] + " the mill" * 20
        lines = (tiny / f"{option}.jsonl").read_text().splitlines()
        lines.insert(1, json.dumps(json.loads(longest) | {"prompt": long_prompt}))
        path = line_file(tmp_path, *lines)
        config = STAGES[stage][1](tiny, tmp_path / stage)
        key = "prompts" if stage == "ppo" else "train"
        data = dataclasses.replace(
            config.data, **{key: path, "max_prompt_tokens": 24}, valid_fraction=0.0
        )
        capsys.readouterr()
        train(dataclasses.replace(config, data=data))
        assert "1 dropped: 1 with a prompt over" in capsys.readouterr().out


HOSTILE = "\x1b]52;c;eA==\x07\x9b2J\u202e"


@pytest.mark.parametrize("name", [HOSTILE, "not_utf8_\udcff", "two\nlines", "[red]{x}$y$"])
def test_names_of_any_bytes_are_taken_and_shown(name: str, tiny: Path, tmp_path: Path, capsys):
    data = tmp_path / f"{name}.jsonl"
    data.write_bytes((tiny / "demonstrations.jsonl").read_bytes() + b"{}\n")
    tokenizer = tmp_path / f"{name}.json"
    tokenizer.write_bytes((tiny / "tokenizer.json").read_bytes())
    config = sft_config(tiny, tmp_path / name)
    changed = dataclasses.replace(config.data, train=data, skip_bad_lines=True)
    train(dataclasses.replace(config, data=changed, tokenizer=tokenizer))
    printed = capsys.readouterr()
    assert dangers(printed.out + printed.err) == []
    assert name.encode("unicode_escape").decode() in printed.out
    assert rows_of(tmp_path / name)
    assert plot_curves(tmp_path / name) == tmp_path / name / "curves.png"


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_errors_show_hostile_names_and_keys(stage: str, fails: Callable, tmp_path: Path):
    path = line_file(tmp_path, json.dumps({HOSTILE: 1}), json.dumps({HOSTILE * 100_000: 1}))
    option = "--data.prompts" if stage == "ppo" else "--data.train"
    for value in (path, tmp_path / HOSTILE, tmp_path / "\udcff" / "x"):
        error = fails(stage, option, value)
        assert dangers(error) == []
        assert len(error) < 1000
    assert dangers(fails(stage, "--config", tmp_path / HOSTILE)) == []
    assert dangers(fails(stage, f"--{HOSTILE}", "1")) == []


def test_prompt_with_no_room_for_a_response(fails: Callable):
    assert "leaves no room for a prompt" in fails("ppo", "--sampling.max-new-tokens", 64)


def test_text_shorter_than_one_sequence(fails: Callable, tmp_path: Path):
    path = write_lines(tmp_path / "short.jsonl", [{"text": "the mill"}])
    assert "do not fill one sequence of 32" in fails("sft", "--data.pretraining", path)
    assert "do not fill one sequence of 32" in fails("ppo", "--data.pretraining", path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(content: str, fails: Callable, tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    for stage, option in (
        ("sft", "--data.train"),
        ("rm", "--data.train"),
        ("ppo", "--data.prompts"),
        ("ppo", "--data.valid"),
    ):
        assert "the file is empty" in fails(stage, option, path)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_nothing_left_to_train_on(stage: str, fails: Callable):
    error = fails(stage, "--data.valid-fraction", 1.0)
    assert "valid-fraction" in error


def other_vocabulary(tiny: Path, folder: Path, role: str) -> Path:
    """A copy of a run that says it has another vocabulary: another tokenizer, one entry less."""
    run = Path(shutil.copytree(tiny / role, folder / role))
    shutil.rmtree(run / "tokenizer")
    (run / "tokenizer").mkdir()
    write_tokenizer(run / "tokenizer" / "tokenizer.json", vocab_size=99)
    for path in run.rglob("network.json"):
        description = json.loads(path.read_text())
        description["size"]["vocab_size"] = 99
        description["tokenizer"] = "another"
        path.write_text(json.dumps(description))
        checkpoint = path.parents[1]
        manifest = read_manifest(checkpoint)
        digest = digest_of_file(path)
        files = manifest.files | {f"{path.parent.name}/network.json": digest}
        write_manifest(checkpoint, dataclasses.replace(manifest, files=files))
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_another_run_writes_into(stage: str, fails: Callable, tmp_path: Path):
    with held(tmp_path / "held"):
        error = fails(stage, directory=tmp_path / "held")
        assert [path.name for path in (tmp_path / "held").iterdir()] == [".lock"]
    assert error.startswith(f"error: {tmp_path / 'held'}: another run writes into this folder: ")
    assert "wait for it, end it, or name another folder" in error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder as another process would, which has a file of its own."""
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_that_are_no_folder_are_noticed_before_training(
    stage: str, fails: Callable, tmp_path: Path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "unmounted")
    error = fails(stage)
    assert error.startswith(f"error: {tmp_path}/run/checkpoints: cannot be written: No such file")


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_may_write_into_a_folder_again(stage: str, tiny: Path, tmp_path: Path):
    config = STAGES[stage][1](tiny, tmp_path / "run")
    for _ in range(2):
        train(config)
        assert not (tmp_path / "run" / ".lock").exists()
    assert len(rows_of(tmp_path / "run")) == {"sft": 3, "rm": 4, "ppo": 2}[stage]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_folder_that_goes_while_a_run_writes_into_it(
    stage: str, fails: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = Metrics.log

    def log_and_remove(self: Metrics, step: int, values: Mapping[str, float]) -> None:
        log(self, step, values)
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(Metrics, "log", log_and_remove)
    error = fails(stage)
    assert str(tmp_path / "run") in error and len(error.splitlines()) == 1


def test_checkpoints_of_different_vocabularies(tiny: Path, fails: Callable, tmp_path: Path):
    for option, role in (("--reward-model", "reward_model"), ("--reference", "reference")):
        run = other_vocabulary(tiny, tmp_path, role)
        error = fails("ppo", option, run)
        assert role in error or "policy" in error
        assert "tokenizer" in error or "vocab" in error


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_tokenizer_of_another_vocabulary(stage: str, fails: Callable, tmp_path: Path):
    path = write_tokenizer(tmp_path / "tokenizer.json", vocab_size=90)
    error = fails(stage, "--tokenizer", path)
    assert "trained with another tokenizer" in error


def test_wrong_tokenizer_leaves_a_run_as_it_was(tiny: Path, fails: Callable, tmp_path: Path):
    run = tmp_path / "earlier"
    train(sft_config(tiny, run))
    kept = {
        p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in str(p)
    }
    path = write_tokenizer(tmp_path / "tokenizer.json", vocab_size=90)
    fails("sft", "--tokenizer", path, directory=run)
    assert {p: p.read_bytes() for p in kept} == kept


@pytest.mark.parametrize(
    ("stage", "role", "cause"),
    [
        ("sft", "reward_model", "no checkpoint of a policy here; it holds reward_model"),
        ("rm", "reward_model", "no checkpoint of a policy here; it holds reward_model"),
    ],
)
def test_checkpoint_of_another_role(stage: str, role: str, cause: str, tiny: Path, fails: Callable):
    assert cause in fails(stage, "--init-from", tiny / role)


def test_policy_in_the_place_of_the_reward_model(tiny: Path, fails: Callable):
    error = fails("ppo", "--reward-model", tiny / "policy")
    assert "no checkpoint of a reward_model here; it holds policy" in error


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--layout.tp", "3"], "layout tp 3"),
        (["--layout.tp", "0"], "layout.tp must be at least 1"),
        (["--layout.pp", "2"], "1 ranks cannot be split"),
        (["--layout.virtual-pp", "2"], "virtual-pp needs"),
        (["--layout.sequence-parallel"], "sequence-parallel needs --layout.tp > 1"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_impossible_layout(stage: str, options: list[str], cause: str, fails: Callable):
    assert cause in fails(stage, *options)


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_option(stage: str, fails: Callable):
    error = fails(stage, "--data.skip-bad-line")
    assert "--data.skip-bad-line" in error
    assert "perhaps you meant --data.skip-bad-lines" in error


@pytest.mark.parametrize(
    ("stage", "options", "cause"),
    [
        ("sft", ["--batch-size", "0"], "batch"),
        ("sft", ["--batch-size", "1"], "batch-size 1 leaves no room for demonstrations"),
        ("sft", ["--epochs", "0"], "epochs"),
        ("sft", ["--epochs", "inf"], "epochs must be finite"),
        ("sft", ["--micro-batch-tokens", "0"], "micro"),
        ("sft", ["--keep", "0"], "keep"),
        ("sft", ["--dropout", "1.5"], "dropout"),
        ("sft", ["--adam.lr", "-1"], "lr must be positive"),
        ("sft", ["--adam.lr", "abc"], "--adam.lr"),
        ("sft", ["--numerics.dtype", "fp8"], "fp8"),
        ("sft", ["--data.pretraining-fraction", "1.0"], "must be in [0, 1)"),
        ("sft", ["--data.valid-fraction", "-1"], "valid"),
        ("sft", ["--data.pretraining-tokens", "1"], "has none to predict"),
        ("sft", ["--data.max-tokens", "0"], "are too long"),
        ("rm", ["--batch-size", "0"], "batch"),
        ("rm", ["--epochs", "-1"], "epochs"),
        ("rm", ["--keep", "0"], "keep"),
        ("ppo", ["--minibatch-size", "3"], "must be a multiple of --minibatch-size 3"),
        ("ppo", ["--minibatch-size", "0"], "minibatch"),
        ("ppo", ["--rollout-batch-size", "0"], "rollout"),
        ("ppo", ["--iterations", "0"], "iterations"),
        ("ppo", ["--ppo-epochs", "0"], "epochs"),
        ("ppo", ["--ema-decay", "1.5"], "ema"),
        ("ppo", ["--gamma", "-1"], "gamma"),
        ("ppo", ["--lam", "2"], "lam"),
        ("ppo", ["--cliprange", "-0.1"], "cliprange"),
        ("ppo", ["--kl.horizon", "0"], "horizon"),
        ("ppo", ["--kl.coef", "inf"], "kl.coef must be finite"),
        ("ppo", ["--eos-penalty", "nan"], "eos-penalty"),
        ("ppo", ["--alarms.patience", "0"], "alarms.patience must be at least 1"),
        ("ppo", ["--sampling.temperature", "0"], "temperature must be positive"),
        ("ppo", ["--sampling.top-p", "0"], "top-p"),
        ("ppo", ["--ptx-examples-per-episode", "0"], "ptx"),
    ],
)
def test_value_that_means_nothing(stage: str, options: list[str], cause: str, fails: Callable):
    error = fails(stage, *options)
    assert cause in error


def test_no_text_at_all(fails: Callable):
    error = fails("sft", "--data.train", "None", "--data.pretraining", "None")
    assert "--data.train or --data.pretraining is required" in error


def test_unknown_size(tiny: Path, fails: Callable):
    options = ["--init-from", "None", "--tokenizer", tiny / "tokenizer.json"]
    for stage in ("sft", "rm"):
        assert "no size is named 'huge'" in fails(stage, "--size", "huge", *options)


def test_folder_that_cannot_be_written(fails: Callable, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    fails("sft", directory=tmp_path / "file" / "run")


def test_recipe_from_the_command_line(tmp_path: Path):
    recipe = [sys.executable, str(ROOT / "recipes" / "sft_tiny.py")]
    done = subprocess.run(
        [*recipe, "--directory", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "t.model")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    *before, error = done.stderr.splitlines()
    assert error == f"error: --tokenizer {tmp_path / 't.model'}: no such file or folder"
    # A torch with CUDA says on machines without a GPU that it found none.
    assert not [line for line in before if not line.startswith("W")]
    assert not (tmp_path / "run").exists()
