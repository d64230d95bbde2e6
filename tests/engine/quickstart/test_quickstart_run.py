"""The quickstart from files, tiny: two ranks, a second start, and errors before any work."""

import fcntl
import json
import signal
from pathlib import Path

import pytest

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.quickstart.files import find_files
from engine.quickstart.places import render_facts
from engine.quickstart.run import _naming_the_options_of, _pair_accuracy, prepare_files, run
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.stop import EXIT_STATUS
from tests.engine.quickstart.small_recipe import data_folder, tiny_config
from tests.ranks import run_ranks
from tests.recipe_runs import saved_step, steps_logged, until
from tests.recipe_runs import start as start_process


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
    assert second[0] == json.loads(json.dumps(first[0]))


def test_a_second_quickstart_is_refused_before_any_work(tmp_path: Path):
    home = tmp_path / "run"
    (home / "data").mkdir(parents=True)
    killed = home / "data" / f".demonstrations.jsonl.{'0' * 32}.partial"
    killed.touch()
    with (home / ".lock").open("w") as lock:  # as another process has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="run: another run writes into this folder"):
            run(tiny_config(home, data_folder(tmp_path / "data")))
    assert sorted(path.name for path in home.iterdir()) == [".lock", "data"]
    assert killed.exists()


@pytest.mark.parametrize(("stage", "prefix"), [("rm", "rm"), ("ppo_ptx", "ppo")])
def test_a_stages_error_says_how_its_options_are_spelled_here(stage: str, prefix: str):
    said = f"x --data.valid\n\\({stage}: .* the quickstart does not have .* --{prefix}. here\\)$"
    with pytest.raises(UserError, match=said), _naming_the_options_of(stage):
        raise UserError("x --data.valid")
    with pytest.raises(UserError, match=r"^no option$"), _naming_the_options_of(stage):
        raise UserError("no option")


def test_made_files_that_somebody_has_removed_are_made_again_the_same(tmp_path: Path):
    config = tiny_config(tmp_path / "run", None, num_prompts=9)
    parallel = start_parallel(ParallelLayout(), seed=0)
    files = prepare_files(config, parallel)
    tokenizer = config.directory / "tokenizer.model"
    made = {p: p.read_bytes() for p in (*config.directory.glob("data/*.jsonl"), tokenizer)}
    assert len(made) == 7
    for path in (files.demonstrations, files.prompts_valid, files.pretraining, tokenizer):
        path.unlink()
    untouched = files.prompts.stat().st_mtime_ns
    prepare_files(config, parallel)
    assert {path: path.read_bytes() for path in made} == made
    assert files.prompts.stat().st_mtime_ns == untouched


def test_accuracy_is_the_last_that_the_metrics_say(tmp_path: Path):
    assert _pair_accuracy(tmp_path) is None
    rows = [{"step": 0, "valid/pair_accuracy": 0.5}, {"step": 1, "valid/pair_accuracy": 0.75}]
    lines = [json.dumps(row) + "\n" for row in (*rows, {"step": 2, "train/loss": 1.0})]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "val')
    assert _pair_accuracy(tmp_path) == 0.75


def test_given_files_stay_as_they_are_and_a_tokenizer_comes_of_them(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    before = {path: path.read_bytes() for path in data.rglob("*.jsonl*")}
    config = tiny_config(tmp_path / "run", data)
    parallel = start_parallel(ParallelLayout(), seed=0)
    files = prepare_files(config, parallel)
    assert files == find_files(config)
    assert {path: path.read_bytes() for path in data.rglob("*.jsonl*")} == before
    tokenizer = config.directory / "tokenizer.model"
    assert [path.name for path in config.directory.iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(tokenizer).vocab_size == config.vocab_size
    written = tokenizer.stat().st_mtime_ns
    prepare_files(config, parallel)
    assert tokenizer.stat().st_mtime_ns == written


QUICKSTART = """
import sys
from pathlib import Path
from engine.quickstart.run import run
from engine.recipe import run_stage
from tests.engine.quickstart.small_recipe import tiny_config
config = tiny_config(Path(sys.argv[1]), Path(sys.argv[2]))
run_stage(run, config, [], has_dry_run=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_quickstart_saves_its_stage_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path
):
    home = tmp_path / "run"
    command = ["-c", QUICKSTART, str(home), str(data_folder(tmp_path / "data"))]
    first = start_process(command, tmp_path / "1")
    try:
        until(lambda: steps_logged(home / "rm") > 1, 300)
        first.process.send_signal(number)
        assert first.wait(100) == EXIT_STATUS
        step = saved_step(home / "rm")
        assert step > 0
        line = f"stopped by a signal at step {step}; the same command continues"
        assert first.said().count(line) == 1
        assert "Traceback" not in first.said()
    finally:
        first.end()
    assert not (home / "ppo").exists()
    assert not (home / ".lock").exists()
    second = start_process(command, tmp_path / "2")
    try:
        until(lambda: "ppo_ptx" in json.loads((home / "stages.json").read_text())["finished"], 300)
        second.process.send_signal(number)  # which judging does not note
        assert second.wait(100) == EXIT_STATUS
        assert second.said().count("stopped by a signal; the same command continues") == 1
        assert "Traceback" not in second.said()
        assert f"rm: goes on after step {step}" in second.said()
    finally:
        second.end()
    assert not (home / "summary.json").exists()
    third = start_process(command, tmp_path / "3")
    try:
        assert third.wait(300) == 0
        assert "ppo_ptx: finished, 2 steps; kept" in third.said()
        assert (home / "summary.json").exists()
    finally:
        third.end()
