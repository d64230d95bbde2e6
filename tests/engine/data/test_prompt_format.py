import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.chat import Asked
from engine.data.prompt_format import (
    DIALOGUES,
    TEXTS,
    Prompt,
    PromptFormat,
    format_differences,
    having_text_turns,
    in_words,
    prompt_format_beside,
    prompt_format_of,
    read_prompt_format,
    trained_on,
    write_prompt_format,
)
from engine.data.renderer import Renderer
from engine.errors import UserError
from tests.fuzzing import fuzzed

HH, OPEN = "\n\nHuman: ", "\n\nAssistant:"
TRAINED = PromptFormat(trained_on=(TEXTS, DIALOGUES))


def test_a_run_keeps_it_and_its_checkpoints_find_it(tmp_path: Path):
    form = PromptFormat(
        prompt_suffix="\n\n###\t",
        chat="template",
        chat_template="ab",
        system="Be\nbrief.",
        roles={"system": "S", "user": "Human", "assistant": "Assistant"},
        trained_on=(DIALOGUES,),
        begins_with=(1, 2),
        ends_with=0,
    )
    assert read_prompt_format(tmp_path) is None
    write_prompt_format(form, tmp_path)
    assert read_prompt_format(tmp_path) == form
    network = tmp_path / "checkpoints" / "step_00000001" / "policy"
    network.mkdir(parents=True)
    (network / "network.json").touch()
    (network.parent / "manifest.json").touch()
    for path in (tmp_path, network.parent, network):
        assert prompt_format_beside(path) == form
    assert prompt_format_beside(tmp_path / "checkpoints") is None  # no part of a run by itself


@pytest.mark.parametrize(
    ("data", "suffix", "kinds"),
    [
        ({"prompt_suffix": " =>", "train": "a.jsonl"}, " =>", (TEXTS, DIALOGUES)),
        ({"prompt_suffix": "", "prompts": "a.jsonl"}, "", (TEXTS, DIALOGUES)),
        ({"prompt_suffix": "\n", "train": None}, "\n", ()),  # pretraining
    ],
)
def test_a_run_of_before_closed_all_by_its_suffix(tmp_path: Path, data, suffix, kinds):
    (tmp_path / "config.json").write_text(json.dumps({"data": data}))
    form = read_prompt_format(tmp_path)
    assert form == PromptFormat(prompt_suffix=suffix, closes_open=True, trained_on=kinds)


@pytest.mark.parametrize(
    "config", [{"model_type": "gpt2"}, {"data": 3}, {"data": {"prompt_suffix": None}}, {}]
)
def test_another_config_says_nothing(tmp_path: Path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_prompt_format(tmp_path) is None


def test_a_lost_file_is_told_again_by_the_settings(tmp_path: Path):
    data = {"prompt_suffix": " ", "chat": "turns", "plain_prompts": "message", "system": "Be."}
    (tmp_path / "config.json").write_text(json.dumps({"data": data | {"train": "a"}}))
    assert read_prompt_format(tmp_path) == PromptFormat(
        prompt_suffix=" ", plain_prompts="message", system="Be.", trained_on=(TEXTS, DIALOGUES)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_suffix": 3},
        {"prompt_suffix": "\ud800"},
        {"chat": "chatml"},
        {"chat": []},
        {"plain_prompts": "messages"},
        {"roles": {"user": "U"}},
        {"roles": {"system": "S", "user": 1, "assistant": "A"}},
        {"closes_open": "yes"},
        {"trained_on": ["words"]},
        {"trained_on": "texts"},
        {"begins_with": [True]},
        {"ends_with": "a"},
        {"suffix": "a"},
    ],
)
def test_what_is_no_format_is_named(tmp_path: Path, change):
    values = dataclasses.asdict(PromptFormat())
    assert prompt_format_of(json.loads(json.dumps(values))) == PromptFormat()
    (tmp_path / "prompt_format.json").write_text(json.dumps(values | change))
    (name,) = change
    with pytest.raises(UserError, match=rf"prompt_format\.json: (unknown field )?{name}") as error:
        read_prompt_format(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kinds", "change", "found"),
    [
        ((), {"prompt_suffix": " ", "chat": "template", "plain_prompts": "message"}, ""),
        ((TEXTS,), {"prompt_suffix": " ", "chat": "template"}, "prompt_suffix"),
        ((TEXTS,), {"plain_prompts": "message"}, "plain_prompts"),
        ((TEXTS,), {"system": "Be brief."}, ""),
        ((DIALOGUES,), {"prompt_suffix": " ", "plain_prompts": "message"}, ""),
        ((DIALOGUES,), {"chat": "template", "chat_template": "ab"}, "chat"),
        ((DIALOGUES,), {"system": "Be brief."}, "system"),
        ((DIALOGUES,), {"separator": "\n"}, "separator"),
        ((TEXTS, DIALOGUES), {"closes_open": True, "leaves_spaced": True}, ""),  # a prompt's matter
    ],
)
def test_what_a_run_was_trained_with_differs_and_nothing_else(kinds, change, found):
    kept = PromptFormat(trained_on=kinds)
    assert format_differences(kept, dataclasses.replace(kept, **change)).keys() == {*found.split()}


def test_a_plain_prompt_that_was_read_as_a_message_stays_one():
    kept = PromptFormat(plain_prompts="message", trained_on=(DIALOGUES,))
    found = format_differences(kept, PromptFormat())
    assert in_words(found, "then", "now") == "plain_prompts 'message' then, 'text' now"


def test_two_templates_differ_where_both_are_known():
    kept = PromptFormat(chat="template", chat_template="ab", trained_on=(DIALOGUES,))
    other = dataclasses.replace(kept, chat_template="cd")
    assert format_differences(kept, other) == {"chat_template": ("ab", "cd")}
    assert format_differences(kept, dataclasses.replace(kept, chat_template="")) == {}
    assert kept.having({"chat": "turns"}).chat_template == ""
    assert kept.having({"chat": "template", "system": None}) == kept


@pytest.mark.parametrize(
    ("suffix", "text", "closed"),
    [
        ("\n", "a", "a\n"),
        ("\n", "a\n", "a\n"),
        ("\n", "a ", "a \n"),
        ("\n", "a\n\n", "a\n\n"),
        ("\n\n", "a\n", "a\n\n"),
        (" =>", "a", "a =>"),
        (" =>", "a ", "a =>"),
        (" =>", "a =>", "a =>"),
        ("\n\n### Response:\n", "a\n", "a\n\n### Response:\n"),
        ("\n\n### Response:\n", "a\n\n### Response:\n", "a\n\n### Response:\n"),
        ("=>", "1 + 1 =", "1 + 1 ==>"),
        ("", "a ", "a "),
        (" =>", f"{HH}Why?{OPEN}", f"{HH}Why?{OPEN}"),
    ],
)
def test_a_closed_prompt_ends_in_the_suffix_once(suffix, text, closed):
    form = PromptFormat(prompt_suffix=suffix)
    assert text + form.closing(text) == closed
    assert form.closing(closed) == ""


@pytest.mark.parametrize(
    ("suffix", "text", "closing"),
    [("\n", "a ", ""), ("\n\n", "a\n", ""), (" =>", "a =>", " =>"), (" =>", f"{HH}a{OPEN}", "")],
)
def test_a_file_of_before_closes_as_it_did(tmp_path: Path, suffix, text, closing):
    values = dataclasses.asdict(PromptFormat(prompt_suffix=suffix))
    del values["leaves_spaced"], values["text_turns"]
    (tmp_path / "prompt_format.json").write_text(json.dumps(values))
    form = read_prompt_format(tmp_path)
    assert form.closing(text) == closing
    write_prompt_format(form, tmp_path)
    assert read_prompt_format(tmp_path) == form


def test_dialogues_in_text_are_known_by_their_beginning_and_end():
    form = PromptFormat()
    assert form.text_turns_of(f"{HH}a{OPEN}") == "\n\nHuman:"
    assert form.text_turns_of(f"Human: a{OPEN}") == "Human:"
    assert form.text_turns_of(f"{HH}a") == form.text_turns_of(f"a{OPEN}") == ""
    texts = [Prompt(f"{HH}a{OPEN}")]
    assert having_text_turns(form, texts * 2 + [Prompt("a")]).text_turns == "\n\nHuman:"
    assert having_text_turns(form, [*texts, Prompt("a")]) == form
    kept = PromptFormat(text_turns="Human:", text_end=" ")
    assert having_text_turns(kept, [Prompt("a", is_dialogue=True)]) == kept
    assert having_text_turns(kept, [Prompt("a")]) == form


def test_an_open_turn_may_have_a_space_behind_it():
    form = PromptFormat()
    text = f"{HH}a{OPEN} "
    assert form.closing(text) == ""
    assert dataclasses.replace(form, leaves_spaced=True, prompt_suffix=" =>").closing(text) == " =>"
    kept = having_text_turns(form, [Prompt(text)] * 2 + [Prompt(f"{HH}b{OPEN}"), Prompt("a")])
    assert (kept.text_turns, kept.text_end) == ("\n\nHuman:", " ")
    assert kept.in_text([{"role": "user", "content": "a"}]) == text


@pytest.mark.parametrize("begin", ["\n\nHuman:", "Human:", "User:"])
def test_a_dialogue_in_text_is_written_as_its_file_has_it(begin: str):
    form = PromptFormat(text_turns=begin)
    said = [{"role": "user", "content": "a"}]
    assert form.in_text(said) == f"{begin} a{OPEN}"
    said += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    name = begin.strip()
    assert form.in_text(said) == f"{begin} a{OPEN} b\n\n{name} c{OPEN}"
    assert form.text_turns_of(form.in_text(said)) == begin
    assert form.next_text_turn == f"\n\n{name}"


def test_kinds_add_up():
    prompts = [Prompt("a"), Prompt("b", is_dialogue=True)]
    assert trained_on((), prompts[:1]) == (TEXTS,)
    assert trained_on((DIALOGUES,), prompts[:1]) == (TEXTS, DIALOGUES)
    assert trained_on((), []) == ()


NAMES = [field.name for field in dataclasses.fields(PromptFormat)]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES |= st.sampled_from(["turns", "template", "message", TEXTS])
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=9), VALUES, max_size=3)


@pytest.mark.fuzz
@fuzzed
@given(values=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=4))
def test_any_file_is_a_format_or_refused_in_a_line(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "prompt_format.json").write_text(json.dumps(values))
    try:
        form = read_prompt_format(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        prompt = Renderer(dataclasses.replace(form, chat="turns")).prompt(Asked("Why?"))
        (prompt.text + prompt.suffix).encode()
        write_prompt_format(form, folder)
        assert read_prompt_format(folder) == form
