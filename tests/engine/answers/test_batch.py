import contextlib
import dataclasses
import shutil

import pytest

from engine.answers.answer import generate_text
from engine.data.prompt_format import PromptFormat, write_prompt_format
from engine.errors import UserError
from engine.generation.generate import generate
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from tests.engine.answers.answering import Killed, answers, assert_same, config, kill_after
from tests.ranks import run_ranks
from tests.tiny import write_lines


def test_a_file_of_prompts_is_answered_in_order(run, tmp_path, capsys):
    generate_text(config(run / "policy", tmp_path, num_samples=2))
    found = answers(tmp_path / "out.jsonl")
    assert [(a["prompt"], a["sample"]) for a in found] == [
        ("the mill", 0),
        ("the mill", 1),
        ("User: families\n\nAssistant:", 0),
        ("User: families\n\nAssistant:", 1),
    ]
    assert all(1 <= a["tokens"] <= 6 and a["logprob"] < 0 for a in found)
    assert found[0]["response"] != found[1]["response"]
    assert "1 dropped: 1 with a prompt over" in capsys.readouterr().out


def test_prompts_of_a_kind_that_was_never_trained_are_told(run, tmp_path, capsys):
    source = shutil.copytree(run / "policy", tmp_path / "texts")
    write_prompt_format(PromptFormat(trained_on=("dialogues",)), source)
    generate_text(config(source, tmp_path))
    told = "prompts are plain texts, and --source "
    assert told in (said := capsys.readouterr().err) and "; --plain-prompts message" in said


def test_the_same_network_in_another_folder_goes_on_and_another_does_not(
    run, tmp_path, monkeypatch, capsys
):
    settings = config(run / "policy", tmp_path, num_samples=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(2, patch)
        generate_text(settings)
    moved = shutil.copytree(run / "policy", tmp_path / "moved")
    elsewhere = dataclasses.replace(settings, source=moved)
    other = dataclasses.replace(settings, source=run / "reference")
    with pytest.raises(UserError, match="has answers with weights .*/policy, not .*/policy; give"):
        generate_text(other)
    generate_text(elsewhere)
    assert "2 of 4 answers are there already" in capsys.readouterr().out
    generate_text(settings)
    assert "finished, 4 answers" in capsys.readouterr().out
    with pytest.raises(UserError, match="has answers with weights .*/policy, not .*/policy; give"):
        generate_text(other)


def test_a_bad_line_names_the_option_that_skips_it_here(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    with settings.prompts.open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(UserError, match="jsonl:4: .*\ncorrect the line, or pass --skip-bad-lines$"):
        generate_text(settings)


def test_rows_of_a_known_shape_are_asked_and_long_ones_cut_where_that_is_wanted(
    run, tmp_path, capsys
):
    settings = config(run / "policy", tmp_path)
    rows = [{"question": "the mill", "x": 1}, {"question": "the " * 200, "x": 1}]
    write_lines(settings.prompts, rows)
    with pytest.raises(UserError, match="name the fields by --fields prompt=..."):
        generate_text(settings)
    named = dataclasses.replace(settings, fields="prompt=question")
    generate_text(named)
    told = " ".join(capsys.readouterr().out.split())
    assert "read as prompt=question" in told
    assert "1 with a prompt over 63 tokens (one less than the model's context of 64)" in told
    assert len(answers(tmp_path / "out.jsonl")) == 1
    generate_text(dataclasses.replace(named, too_long="cut-left", overwrite=True))
    assert "2 kept (1 of them cut)" in capsys.readouterr().out
    assert len(answers(tmp_path / "out.jsonl")) == 2


@pytest.mark.slow
def test_two_replicas_share_the_prompts(run, tmp_path):
    generate_text(config(run / "policy", tmp_path, num_samples=2))
    expected = answers(tmp_path / "out.jsonl")
    both = config(run / "policy", tmp_path, num_samples=2, out=tmp_path / "both.jsonl")
    run_ranks(generate_text, 2, both)
    assert_same(answers(tmp_path / "both.jsonl"), expected)


def test_a_killed_run_goes_on_and_draws_the_same(run, tmp_path, monkeypatch, capsys):
    settings = config(run / "policy", tmp_path, num_samples=4)
    generate_text(settings)
    expected = answers(settings.out)
    settings = dataclasses.replace(settings, out=tmp_path / "again.jsonl")
    part = tmp_path / "again.jsonl.partial" / "0.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(3, patch)
        generate_text(settings)
    kept = part.read_bytes()
    assert not settings.out.exists()
    assert kept.count(b"\n") == 3
    part.write_bytes(kept[:-7])  # as if within a write
    drawn: list[int] = []

    def count(*arguments, **options):
        drawn.extend(options["sample_indices"])
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("engine.answers.batch.generate", count)
        generate_text(settings)
    assert "2 of 8 answers are there already" in capsys.readouterr().out
    assert len(drawn) == 6
    assert_same(answers(settings.out), expected)
    assert not part.parent.exists()


def test_a_run_killed_before_its_last_step_draws_nothing_again(run, tmp_path, monkeypatch):
    settings = config(run / "policy", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("engine.answers.kept.Answers.finish", killed)
        generate_text(settings)
    kill_after(0, monkeypatch)
    generate_text(settings)
    assert len(answers(settings.out)) == 2


def killed(*arguments) -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(pp=2)], ids=["dp", "tp", "pp"]
)
def test_two_ranks_go_on_where_two_were_killed(layout, run, tmp_path):
    settings = config(run / "policy", tmp_path, num_samples=4)
    generate_text(settings)
    expected = answers(settings.out)
    settings = dataclasses.replace(settings, out=tmp_path / "both.jsonl", layout=layout)
    run_ranks(stop_on_ranks, 2, settings)
    parts = sorted((tmp_path / "both.jsonl.partial").glob("*.jsonl"))
    num_replicas = 2 if layout == ParallelLayout() else 1
    assert [part.read_bytes().count(b"\n") for part in parts] == [3] * num_replicas
    parts[-1].write_bytes(parts[-1].read_bytes()[:-7])
    run_ranks(generate_text, 2, settings)
    assert_same(answers(settings.out), expected)


def stop_on_ranks(settings: GenerateConfig) -> None:
    """Draw three answers on every replica."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        kill_after(3, patch)
        generate_text(settings)
