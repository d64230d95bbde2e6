"""A long work says what it is about: where nobody counts, within one call, and on one rank only."""

import dataclasses
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from engine import progress
from engine.data.prompt_format import Prompt
from engine.progress import SECONDS_A_LINE, LongWork
from engine.quickstart.comparisons import write_comparisons
from engine.quickstart.files import find_files
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.judge import judge_models
from engine.quickstart.places import fact_lists, render_facts
from engine.quickstart.report import MODELS
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from recipes.quickstart import config as recipe
from tests.tiny import SIZE, write_checkpoints, write_files, write_lines

SECONDS = 0.02


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every SECONDS."""
    monkeypatch.setattr(progress, "SECONDS_A_LINE", SECONDS)


def wait_for(lines: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what has been said, once it is that many lines."""
    said, end = "", time.monotonic() + 20
    while said.count("\n") < lines:
        assert time.monotonic() < end, said
        time.sleep(SECONDS)
        said += capsys.readouterr().out
    return said.splitlines()


def test_a_log_hears_at_once_what_begins_and_then_that_it_goes_on(capsys):
    with LongWork("report", is_writer=True):
        assert capsys.readouterr().out == "report\n"
        lines = wait_for(2, capsys)
    assert all(re.fullmatch(r"report +after \d+ s", line) for line in lines)
    capsys.readouterr()
    time.sleep(5 * SECONDS)
    assert capsys.readouterr().out == ""  # it has ended


def test_a_log_hears_how_much_is_done_and_how_long_the_rest_takes(capsys):
    with LongWork("label", is_writer=True, total=4) as work:
        for _ in range(3):
            work.advance("the next")
        lines = wait_for(3, capsys)
    assert re.fullmatch(r"label 3/4  the next  eta 0:00", lines[-1])


def test_the_rest_shrinks_while_a_part_is_under_way(monkeypatch):
    work = LongWork("judge", is_writer=False, total=4)
    now = work._start
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    now += 10.0
    work.advance()
    now += 4.0
    assert work._line().endswith("eta 0:26")  # of 40 s
    now += 100.0
    assert work._line().endswith("eta 0:00")


def test_a_terminal_has_a_bar_and_no_lines(capsys):
    console = Console(force_terminal=True, width=80, color_system=None)
    with LongWork("label", is_writer=True, total=2, console=console) as work:
        work.advance("second")
        time.sleep(5 * SECONDS)
    said = capsys.readouterr().out
    assert "label  second" in said
    assert "1/2" in said
    assert "eta" not in said


def test_other_ranks_are_silent(capsys):
    with LongWork("label", is_writer=False, total=2) as work:
        work.advance()
        time.sleep(5 * SECONDS)
    assert capsys.readouterr().out == ""


def test_the_voice_ends_with_work_that_fails(capsys):
    with pytest.raises(ValueError, match="no"), LongWork("label", is_writer=True):
        raise ValueError("no")
    capsys.readouterr()
    time.sleep(5 * SECONDS)
    assert capsys.readouterr().out == ""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a quickstart whose stages have ended, with random networks."""
    size = dataclasses.replace(SIZE, context_length=256)
    write_files(tmp_path)
    write_checkpoints(tmp_path, size)
    (tmp_path / "rm").symlink_to(tmp_path / "reward_model")
    for name in MODELS:
        (tmp_path / name).symlink_to(tmp_path / "policy")
    return tmp_path


def test_labeling_and_judging_say_how_far_they_are(home: Path, capsys):
    sampling = dataclasses.replace(recipe.ppo.sampling, max_new_tokens=32, num_slots=4)
    config = dataclasses.replace(
        recipe,
        directory=home,
        num_compared=12,
        num_judged=8,
        pretrain=dataclasses.replace(
            recipe.pretrain, data=dataclasses.replace(recipe.pretrain.data, pretraining_tokens=32)
        ),
        ppo=dataclasses.replace(recipe.ppo, sampling=sampling),
    )
    files = find_files(config)
    files.prompts_valid.parent.mkdir()
    facts = fact_lists("valid", config.num_judged, seed=1)
    write_lines(files.prompts_valid, ({"prompt": render_facts(f)} for f in facts))
    write_lines(files.pretraining_valid, ({"text": "the mill is near the river " * 90},))
    parallel = start_parallel(ParallelLayout(), seed=0)
    finished = FinishedStages(home, parallel, config.numerics, config.ppo, seed=0)

    write_comparisons(config, files, finished)
    said = capsys.readouterr().out
    shares = [int(n) for n in re.findall(r"^label: 78 answers of SFT (\d+)/78 +eta", said, re.M)]
    assert len(shares) > 1
    assert shares == sorted(shares)
    assert shares[0] < 78
    assert "\nlabel: rank them\n" in said

    summary, _ = judge_models(config, files, finished)
    said = capsys.readouterr().out
    for model in MODELS.values():
        assert re.search(rf"^judge: 8 prompts.*  {model} answers  (eta|after)", said, re.M), said
    assert summary["sft"]["kl_from_init"] == 0.0


def test_the_same_texts_are_written_with_and_without_a_listener(home: Path):
    config = dataclasses.replace(recipe.ppo.sampling, max_new_tokens=16, num_slots=4)
    ppo = dataclasses.replace(recipe.ppo, sampling=config)
    parallel = start_parallel(ParallelLayout(), seed=0)
    finished = FinishedStages(home, parallel, recipe.numerics, ppo, seed=3)
    network = finished.load("sft", "language")
    asked = ("the mill is", "a cheap pub near the river", "the mill is", "fish")
    prompts = [Prompt(text) for text in asked]
    heard: list[None] = []
    texts = finished.answer(network, prompts, lambda: heard.append(None))[1]
    assert texts == finished.answer(network, prompts)[1]
    assert len(heard) == 4
    assert texts[0] != texts[2]  # draws of their own


def test_a_log_is_never_silent_for_five_seconds():
    assert SECONDS_A_LINE < 5.0


def test_a_title_is_text_on_a_terminal_and_in_a_log(capsys):
    title, now = "[/red] {x} \x1b[2J", "\u202epart\x9b"
    screen = Console(force_terminal=True, width=120, color_system=None)
    for console in (screen, None):
        with LongWork(title, is_writer=True, total=2, console=console) as work:
            work.advance(now)
            time.sleep(5 * SECONDS)
        said = capsys.readouterr().out
        assert "[/red] {x} \\x1b[2J" in said
        assert "\\u202epart\\x9b" in said
        assert not {"\u202e", "\x9b"} & set(said)
        assert "\x1b[2J" not in said
