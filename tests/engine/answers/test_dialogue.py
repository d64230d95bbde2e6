import io
import shutil
from pathlib import Path

import pytest

from engine.answers.answer import generate_text
from engine.answers.dialogue import _Screen, _show, _TurnEnded
from engine.data.prompt_format import PromptFormat, write_prompt_format
from engine.data.tokenizer import load_tokenizer
from engine.printable import printable
from tests.engine.answers.answering import SAMPLING, config
from tests.hostile import EVERYTHING, dangers


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


def talked(source, tmp_path, monkeypatch, lines: list[str], reply: str = " a mill", **options):
    """What a model is asked that answers every line so: texts, with the tokens of each."""
    asked, typed = [], iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or cut_off())

    def answer(network, prompts, *rest, tokenizer, on_tokens, **others):
        asked.append((tokenizer.decode(prompts[0].tolist()), prompts[0].tolist()))
        on_tokens(0, tokenizer.encode(reply))
        return []

    monkeypatch.setattr("engine.answers.dialogue.generate", answer)
    generate_text(config(source, tmp_path, prompts=None, **options))
    return asked


def test_a_dialogue_goes_on_until_it_starts_over_or_ends(run, tmp_path, monkeypatch, capsys):
    lines = ["the", "/help", "pub", "/new", "fish", "exit", "never"]
    asked = [tokens for _, tokens in talked(run / "policy", tmp_path, monkeypatch, lines)]
    encode = load_tokenizer(run / "policy" / "tokenizer").encode
    assert asked == [
        encode("User: the\n\nAssistant:"),
        encode("User: the\n\nAssistant: a mill\n\nUser: pub\n\nAssistant:"),
        encode("User: fish\n\nAssistant:"),
    ]
    assert capsys.readouterr().out.count("/new starts over, /help says this, /quit or Ctrl-D") == 2


def test_a_model_of_plain_prompts_is_asked_line_by_line_as_a_file_is(
    run, tmp_path, monkeypatch, capsys
):
    source = Path(shutil.copytree(run / "policy", tmp_path / "policy"))
    write_prompt_format(PromptFormat(prompt_suffix=" the", trained_on=("texts",)), source)
    asked = talked(source, tmp_path, monkeypatch, ["mill", "pub", "quit"])
    tokenizer = load_tokenizer(source / "tokenizer")
    assert [tokens for _, tokens in asked] == [
        tokenizer.encode("mill the"),
        tokenizer.encode("pub the"),
    ]
    assert capsys.readouterr().out.count("trained on plain prompts alone: each line is one") == 1
    talked(source, tmp_path, monkeypatch, ["mill"], system="Be brief.")
    assert "WARNING: --system goes before dialogues" in capsys.readouterr().err
    in_turns = talked(source, tmp_path, monkeypatch, ["mill"], chat="turns")
    assert in_turns[0][1] == tokenizer.encode("User: mill\n\nAssistant:")


@pytest.mark.parametrize("plain", ["text", "message"])
def test_a_model_of_dialogues_in_text_is_asked_in_their_turns(plain, run, tmp_path, monkeypatch):
    source = Path(shutil.copytree(run / "policy", tmp_path / "policy"))
    form = PromptFormat(text_turns="\n\nHuman:", trained_on=("texts",), plain_prompts=plain)
    write_prompt_format(form, source)
    ends: list[str] = []
    monkeypatch.setattr(
        "engine.answers.dialogue._Screen", lambda *given: ends.append(given[2]) or _Screen(*given)
    )
    asked = talked(source, tmp_path, monkeypatch, ["mill", "pub", "/new", "fish"])
    assert ends == ["\n\nHuman:"] * 3
    encode = load_tokenizer(source / "tokenizer").encode
    assert [tokens for _, tokens in asked] == [
        encode("\n\nHuman: mill\n\nAssistant:"),
        encode("\n\nHuman: mill\n\nAssistant: a mill\n\nHuman: pub\n\nAssistant:"),
        encode("\n\nHuman: fish\n\nAssistant:"),
    ]
    in_turns = talked(source, tmp_path, monkeypatch, ["mill"], chat="turns")
    assert in_turns[0][1] == encode("User: mill\n\nAssistant:")


def test_a_command_that_is_none_is_said_and_not_asked(run, tmp_path, monkeypatch, capsys):
    lines = ["/foo", "/New", "/usr/bin", "/ a", "quit"]
    assert len(talked(run / "policy", tmp_path, monkeypatch, lines)) == 2
    out = capsys.readouterr().out
    assert "/foo: no such command; /new starts over, /help says this, /quit" in out
    assert out.count("no such command") == 2


def test_a_line_that_becomes_no_token_is_said_and_not_asked(run, tmp_path, monkeypatch, capsys):
    source = Path(shutil.copytree(run / "policy", tmp_path / "policy"))
    write_prompt_format(PromptFormat(prompt_suffix="", trained_on=("texts",)), source)
    assert len(talked(source, tmp_path, monkeypatch, ["\u6f22\u5b57", "mill"])) == 1
    assert 'That cannot be asked: field "prompt" becomes no token' in capsys.readouterr().out


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
    next_turn = PromptFormat().next_turn
    screen = _Screen(Letters(), shown.append, next_turn)
    shown.clear()
    with pytest.raises(_TurnEnded):
        for letter in f"Yes.\nNo.{next_turn} and so on":
            screen.add(0, [ord(letter)])
    screen.finish()
    assert screen.text == "Yes.\nNo."
    assert "".join(shown) == "Yes.\nNo.\n"


def shown_in_parts(text: str) -> str:
    shown: list[str] = []
    screen = _Screen(Letters(), shown.append)
    for letter in text:
        screen.add(0, [ord(letter)])
        assert dangers("".join(shown)) == []
    screen.finish()
    return "".join(shown).removesuffix("\n")


def test_an_answer_has_no_command_to_the_terminal():
    shown = shown_in_parts(f"line\n\tline {EVERYTHING} end")
    assert dangers(shown) == []
    assert shown.startswith("line\n\tline \\x1b]52;")
    assert shown.endswith(" end")


@pytest.mark.parametrize(
    "text",
    [
        "\u2764\ufe0f\u200d\U0001f525 \u0645\u06cc\u200c\u062e",
        "a\u200db \u65e5\u200d",
        "1\ufe0f x\ufe0f",
    ],
)
def test_an_answer_in_parts_is_shown_as_it_is_whole(text: str):
    assert shown_in_parts(text) == printable(text)


def test_a_screen_of_any_encoding_takes_an_answer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    _show("\u65e5", is_writer=True)
    assert raw.getvalue() == b"\\u65e5"
