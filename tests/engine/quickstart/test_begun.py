"""A quickstart in a folder that an earlier start has used."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.begun import FOLDERS, Begun, begin
from engine.quickstart.files import find_files
from engine.quickstart.run import run
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from tests.engine.quickstart.small_recipe import data_folder, tiny_config


@pytest.fixture
def config(tmp_path: Path):
    start_parallel(ParallelLayout(), seed=0)
    (tmp_path / "run").mkdir()
    return tiny_config(tmp_path / "run", data_folder(tmp_path / "data"))


def checkpoint(home: Path, stage: str, step: int) -> None:
    folder = home / FOLDERS[stage] / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest").write_text(f"step_{step:08d}")


def begun_with(config, *finished: str) -> Begun:
    """Leave what a start leaves that has finished some stages."""
    begun = begin(config, is_writer=True)
    begun.check_files(find_files(config))
    for stage in finished:
        begun.run(stage, lambda stage=stage: checkpoint(config.directory, stage, 22))
    return begun


def test_a_new_folder_has_everything_to_do(config, capsys):
    begun = begin(config, is_writer=True)
    assert (begun.finished, begun.seconds) == (set(), {})
    assert capsys.readouterr().out == ""


def test_what_is_there_is_said_stage_by_stage(config, capsys):
    begun_with(config, "pretrain", "sft")
    checkpoint(config.directory, "rm", 7)
    begun = begin(config, is_writer=True)
    assert begun.finished == {"pretrain", "sft"}
    assert capsys.readouterr().out.splitlines() == [
        "pretrain: finished, 22 steps; kept",
        "sft: finished, 22 steps; kept",
        "rm: goes on after step 7",
        "ppo: new",
        "ppo_ptx: new",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 600}, "vocab_size 400, not 600"),
        ({"num_demonstrations": 400}, "num_demonstrations 60, not 400"),
        ({"num_compared": 9}, "num_compared 3000, not 9"),
        ({"faults_per_level": 2.0}, "faults_per_level 1.0, not 2.0"),
        ({"num_prompts": 9}, "num_prompts 2000, not 9"),
        ({"num_pretraining_tokens": 1}, "num_pretraining_tokens 2000, not 1"),
        ({"seed": 5}, "seed 0, not 5"),
    ],
)
def test_other_settings_are_refused_by_name(config, change, said):
    begun_with(config)
    with pytest.raises(UserError) as error:
        begin(dataclasses.replace(config, **change), is_writer=True)
    assert f"is a quickstart with {said}; give another --directory" in str(error.value)
    begin(config, is_writer=True)  # the refused start has changed nothing


def test_a_stages_own_settings_count_and_its_speed_does_not(config):
    begun_with(config)
    rm = dataclasses.replace(config.rm, epochs=3.0)
    with pytest.raises(UserError, match=r"rm.epochs 1.0, not 3.0"):
        begin(dataclasses.replace(config, rm=rm), is_writer=True)
    data = dataclasses.replace(config.rm.data, max_tokens=77)
    with pytest.raises(UserError, match=r"rm.data.max_tokens \d+, not 77"):
        begin(
            dataclasses.replace(config, rm=dataclasses.replace(config.rm, data=data)),
            is_writer=True,
        )
    rm = dataclasses.replace(config.rm, micro_batch_tokens=64)
    begin(dataclasses.replace(config, rm=rm), is_writer=True)


def test_settings_may_change_before_anything_has_come_of_them(config):
    begin(config, is_writer=True)
    (config.directory / "tokenizer.model").write_text("of 400")
    begin(dataclasses.replace(config, vocab_size=600), is_writer=True)
    assert not (config.directory / "tokenizer.model").exists()


def test_files_of_another_content_are_refused_by_name(config):
    begun_with(config)
    prompts = config.data / "prompts/e2e.train.jsonl"
    content = prompts.read_text()
    prompts.write_text(content + '{"prompt": "one more"}\n')
    with pytest.raises(UserError, match="e2e.train.jsonl: other content than that which"):
        begin(config, is_writer=True).check_files(find_files(config))
    prompts.write_text(content)
    begin(config, is_writer=True).check_files(find_files(config))


def test_files_may_lie_elsewhere_but_not_be_given_in_place_of_made_ones(config):
    begun_with(config, "pretrain")
    elsewhere = Path(shutil.copytree(config.data, config.data.with_name("moved")))
    moved = dataclasses.replace(config, data=elsewhere)
    begin(moved, is_writer=True).check_files(find_files(moved))
    with pytest.raises(UserError, match=f"is a quickstart with data {elsewhere}, not None; give"):
        begin(dataclasses.replace(config, data=None), is_writer=True)


def test_stages_that_were_made_from_one_that_is_gone_are_refused(config):
    begun_with(config, "pretrain", "sft", "rm")
    (config.directory / "sft/checkpoints/latest").unlink()
    with pytest.raises(UserError, match="run/rm was made from another sft than will be there"):
        begin(config, is_writer=True)


def test_stages_without_a_record_are_refused(config):
    checkpoint(config.directory, "pretrain", 3)
    with pytest.raises(UserError, match="no stages.json that says what they were made from"):
        begin(config, is_writer=True)


@pytest.mark.parametrize("text", ["[]", "{}", "", '{"seconds": {"a": "b"}}', "\0"])
def test_a_damaged_record_is_named(config, text):
    (config.directory / "stages.json").write_text(text)
    with pytest.raises(UserError, match="stages.json.*; nobody knows .* give another --directory$"):
        begin(config, is_writer=True)


@pytest.mark.parametrize("text", ["[]", '{"seed": ', None])
def test_damaged_settings_have_a_remedy(config, text):
    begun_with(config, "pretrain")
    (config.directory / "config.json").unlink()
    if text is not None:
        (config.directory / "config.json").write_text(text)
    with pytest.raises(
        UserError, match="config.json.*; nobody knows .* remove the folder to begin"
    ):
        begin(config, is_writer=True)


def test_a_made_file_of_another_content_can_be_removed(config):
    tokenizer = config.directory / "tokenizer.model"
    tokenizer.write_text("whole")
    begun = begun_with(dataclasses.replace(config, vocab_size=400))
    tokenizer.write_text("who")
    begun.digests["tokenizer"] = "of the whole one"
    with pytest.raises(UserError, match="tokenizer.model: .* remove it, and it is made again, or "):
        begun.check_files(find_files(config))


def test_results_are_there_while_they_are_as_they_were_written(config, capsys):
    names = ("summary.json", "report.html")
    begun = begun_with(config)
    assert not begun.has_results(names)
    for name in names:
        (config.directory / name).write_text("{}")
    begun.keep_results(names)
    again = begin(config, is_writer=True)
    assert again.has_results(names)
    capsys.readouterr()
    for name, damage in (("summary.json", '{"a'), ("report.html", "")):
        path = config.directory / name
        path.write_text(damage)
        assert not again.has_results(names)
        assert f"{path}: changed or damaged; it is made again" in capsys.readouterr().out
        path.write_text("{}")
    assert again.has_results(names)
    (config.directory / "report.html").unlink()
    assert not again.has_results(names)


def test_a_stage_that_runs_again_is_judged_again(config):
    begun_with(config, "pretrain").run("judge", lambda: None)
    assert begin(config, is_writer=True).finished == {"pretrain", "judge"}
    begun = begin(config, is_writer=True)
    with pytest.raises(KeyboardInterrupt):
        begun.run("sft", interrupted)
    assert begin(config, is_writer=True).finished == {"pretrain"}


def test_seconds_add_up_over_starts_that_end_early(config):
    begun = begun_with(config)
    begun.seconds["rm"] = 100.0
    with pytest.raises(KeyboardInterrupt):
        begun.run("rm", interrupted)
    begun.seconds |= {"sft": 7.0}
    begun.run("ppo", lambda: None)
    again = begin(config, is_writer=True)
    assert again.seconds["rm"] > 100.0
    assert again.seconds["sft"] == 7.0
    assert "rm" not in again.finished


def interrupted() -> None:
    time.sleep(0.1)
    raise KeyboardInterrupt


@pytest.mark.slow  # every stage
def test_a_finished_quickstart_prints_what_it_found_and_its_seconds_stay(config, capsys):
    first = run(config)
    written = {path: path.stat().st_mtime_ns for path in config.directory.glob("*/checkpoints/*")}
    capsys.readouterr()
    assert run(config) == json.loads(json.dumps(first))
    out = capsys.readouterr().out
    assert "ppo_ptx: finished, 2 steps; kept" in out
    assert "judge:" not in out
    summary = json.loads((config.directory / "summary.json").read_text())
    assert summary["seconds"] == first["seconds"]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    whole = (config.directory / "summary.json").read_bytes()
    (config.directory / "summary.json").write_bytes(whole[: len(whole) // 2])
    metrics = config.directory / "rm" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99')
    again = run(config)
    assert "summary.json: changed or damaged" in capsys.readouterr().out
    for summary in (again, first):
        summary.pop("seconds")
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(first))
