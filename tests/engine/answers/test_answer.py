import contextlib
import dataclasses
import functools
import json
import shutil

import pytest
import torch

from engine.answers.answer import generate_text
from engine.answers.dialogue import NEXT_TURN, _Screen, _TurnEnded
from engine.answers.load import load_model
from engine.errors import UserError
from engine.generation.generate import generate
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from tests.ranks import run_ranks
from tests.tiny import write_checkpoints, write_files, write_lines, write_tokenizer

SAMPLING = SamplingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_files(folder)
    write_checkpoints(folder)
    return folder


def config(source, tmp_path, **changes) -> GenerateConfig:
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "the mill"},
            {"prompt": "a pub near the river " * 40},  # longer than the context
            {"messages": [{"role": "user", "content": "families"}]},
        ],
    )
    settings = {
        "source": source,
        "prompts": prompts,
        "out": tmp_path / "out.jsonl",
        "sampling": SAMPLING,
    }
    return GenerateConfig(**(settings | changes))


def answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert "1 dropped for a long prompt" in capsys.readouterr().out


@pytest.mark.slow
def test_two_replicas_share_the_prompts(run, tmp_path):
    generate_text(config(run / "policy", tmp_path, num_samples=2))
    expected = answers(tmp_path / "out.jsonl")
    both = config(run / "policy", tmp_path, num_samples=2, out=tmp_path / "both.jsonl")
    run_ranks(generate_text, 2, both)
    assert_same(answers(tmp_path / "both.jsonl"), expected)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def kill_after(num_answers: int, monkeypatch) -> None:
    """Let the process end when so many answers have come."""
    monkeypatch.setattr("engine.answers.batch.generate", functools.partial(dying, num_answers))


def dying(num_answers: int, *arguments, **options):
    for number, response in enumerate(generate(*arguments, **options)):
        if number == num_answers:
            raise Killed
        yield response


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for answer, other in zip(found, expected, strict=True):
        # Rounding depends on which answers are drawn together.
        assert answer.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
        assert answer == other


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 2}, "seed 1, not 2"),
        ({"num_samples": 3}, "num_samples 2, not 3"),
        (
            {"sampling": SamplingConfig(max_new_tokens=6, top_p=0.9)},
            "sampling.top_p 1.0, not 0.9; give another --out, or remove the folder",
        ),
        ({"prompt_suffix": " "}, "prompts [0-9a-f]{16}, not"),
        ({"source": "reference"}, "weights .*policy/checkpoints.*, not .*reference/checkpoints"),
    ],
)
def test_answers_of_other_settings_are_not_continued(run, tmp_path, monkeypatch, change, match):
    settings = config(run / "policy", tmp_path, num_samples=2)
    change = {name: run / x if name == "source" else x for name, x in change.items()}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(1, patch)
        generate_text(settings)
    with pytest.raises(UserError, match=match):
        generate_text(dataclasses.replace(settings, **change))
    # How fast answers are drawn may change.
    faster = dataclasses.replace(settings.sampling, num_slots=1)
    generate_text(dataclasses.replace(settings, sampling=faster))
    assert len(answers(settings.out)) == 4


def test_a_folder_without_answers_stands_in_nobodys_way(run, tmp_path, monkeypatch):
    settings = config(run / "policy", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(0, patch)
        generate_text(settings)
    generate_text(dataclasses.replace(settings, seed=2))
    assert len(answers(settings.out)) == 2


def test_a_damaged_line_is_named(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    part = tmp_path / "out.jsonl.partial" / "0.jsonl"
    part.parent.mkdir()
    part.write_text("\0\0\n")
    with pytest.raises(UserError, match="0.jsonl:1: damaged; remove the line"):
        generate_text(settings)


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


def test_a_huggingface_folder_answers_too(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)
    generate_text(config(folder, tmp_path))
    assert len(answers(tmp_path / "out.jsonl")) == 3  # its context is longer


def test_a_dialogue_answers_until_the_end_of_input(run, tmp_path, monkeypatch, capsys):
    lines = iter(["the mill", "", "fish " * 60, "/new", "river"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    generate_text(config(run / "policy", tmp_path, prompts=None))
    out = capsys.readouterr().out
    assert "too long" in out
    assert len(out.splitlines()) >= 4


def test_ctrl_c_ends_an_answer_and_not_the_dialogue(run, tmp_path, monkeypatch, capsys):
    lines = iter(["the mill", "river"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or cut_off())
    add, num_tokens = _Screen.add, []

    def add_and_interrupt(screen: _Screen, index: int, tokens: list[int]) -> None:
        add(screen, index, tokens)
        num_tokens.append(len(tokens))
        if len(num_tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Screen, "add", add_and_interrupt)
    generate_text(config(run / "policy", tmp_path, prompts=None))
    assert 3 < len(num_tokens) <= 3 + SAMPLING.max_new_tokens  # the second answer was given


def cut_off() -> str:
    raise EOFError


@pytest.mark.parametrize("dialogue", [False, True])
def test_weights_that_are_not_finite_are_a_mistake(dialogue, run, tmp_path, monkeypatch):
    def load_broken(config: GenerateConfig):
        network, tokenizer = load_model(config)
        next(network.modules[0].parameters()).data.fill_(torch.nan)
        return network, tokenizer

    monkeypatch.setattr("engine.answers.answer.load_model", load_broken)
    monkeypatch.setattr("builtins.input", lambda prompt: "the mill")
    settings = config(run / "policy", tmp_path, **({"prompts": None} if dialogue else {}))
    with pytest.raises(UserError, match="policy: the logits of sample .* are not finite"):
        generate_text(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"source": None}, "--source is required"),
        ({"sampling": SamplingConfig(top_p=0.0)}, "top_p"),
    ],
)
def test_a_mistake_is_named(run, tmp_path, change, match):
    settings = {"source": run / "policy"} | change
    with pytest.raises(UserError, match=match):
        generate_text(config(tmp_path=tmp_path, **settings))


class Letters:
    """A tokenizer of single characters; id 0 is half of a character."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) if i else "\ufffd" for i in ids)


def test_the_screen_holds_back_what_may_change_and_stops_at_the_next_turn():
    shown: list[str] = []
    screen = _Screen(Letters(), shown.append)
    for letter in "Hi.":
        screen.add(0, [ord(letter)])
    assert "".join(shown) == "Hi."
    screen.add(0, [0])
    screen.add(0, [])
    assert "".join(shown) == "Hi."
    screen = _Screen(Letters(), shown.append)
    shown.clear()
    with pytest.raises(_TurnEnded):
        for letter in f"Yes.\nNo.{NEXT_TURN} and so on":
            screen.add(0, [ord(letter)])
    screen.finish()
    assert screen.text == "Yes.\nNo."
    assert "".join(shown) == "Yes.\nNo.\n"
