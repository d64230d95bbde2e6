"""Which form messages are read in, and that a model answers as transformers has it answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.answers.answer import generate_text
from engine.answers.asked import asked_as
from engine.data.chat import Asked
from engine.data.prompt_format import PromptFormat, write_prompt_format
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.settings.generate import GenerateConfig
from engine.settings.sampling import SamplingConfig
from tests.engine.answers.answering import answers
from tests.engine.data.test_chat_template import DIALOGUES, TEMPLATES, USER, folder_of
from tests.families import save_family
from tests.tiny import write_lines

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama's folder with a chat template."""
    path = tmp_path / "theirs"
    save_family("llama", path, max_position_embeddings=512)
    return folder_of(path, TEMPLATES["chatml"])


def settings(source: Path, tmp_path: Path, **changes: object) -> GenerateConfig:
    asked = [{"messages": messages} for messages in DIALOGUES]
    prompts = write_lines(tmp_path / "asked.jsonl", [*asked, {"prompt": "the mill"}])
    values = {"source": source, "prompts": prompts, "out": tmp_path / "out.jsonl"}
    return GenerateConfig(**(values | {"sampling": GREEDY} | changes))


def test_a_folder_is_asked_by_its_template_and_answers_as_transformers_has_it(folder, tmp_path):
    generate_text(settings(folder, tmp_path))
    *found, plain = answers(tmp_path / "out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for messages, answer in zip(DIALOGUES, found, strict=True):
        asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        prompt = tokenizer.apply_chat_template(messages, **asked)["input_ids"]
        with torch.no_grad():
            theirs = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        theirs = theirs[0, prompt.shape[1] :].tolist()
        ours = load_tokenizer(folder).decode([token for token in theirs if token < 300])
        assert answer["response"] == ours
        assert answer["tokens"] == len(theirs)
        assert answer["prompt"] == tokenizer.decode(prompt[0], skip_special_tokens=False)
    assert plain["prompt"] == "the mill"


def test_a_source_is_asked_as_it_was_trained_unless_told_otherwise(folder, tiny, tmp_path, capsys):
    tokenizer = load_tokenizer(folder)
    run = Path(shutil.copytree(tiny / "policy", tmp_path / "run"))
    assert asked_as(settings(folder, tmp_path), tokenizer).form.chat == "template"
    assert asked_as(settings(folder, tmp_path, chat="turns"), tokenizer).form.chat == "turns"
    own = load_tokenizer(run / "tokenizer")
    assert asked_as(settings(run, tmp_path), own).form == PromptFormat()
    with pytest.raises(UserError, match="has no chat template"):
        asked_as(settings(run, tmp_path, chat="template"), own)
    assert capsys.readouterr().err == ""
    write_prompt_format(PromptFormat(prompt_suffix=" =>", trained_on=("texts",)), run)
    assert asked_as(settings(run, tmp_path), own).form.prompt_suffix == " =>"
    assert asked_as(settings(run, tmp_path, prompt_suffix=""), own).form.prompt_suffix == ""
    said = f"WARNING: {run} was trained to read prompts in another form than it is asked in: "
    assert f"{said}prompt_suffix ' =>' then, '' now" in capsys.readouterr().err
    asked_as(settings(run, tmp_path, system="Be."), own)  # of dialogues, which it has not seen
    assert capsys.readouterr().err == ""


def test_a_run_of_before_is_asked_in_the_form_that_it_was_trained_in(tiny, tmp_path):
    run = Path(shutil.copytree(tiny / "policy", tmp_path / "run"))
    data = {"train": "chats.jsonl", "prompt_suffix": "\n"}
    (run / "config.json").write_text(json.dumps({"data": data}))
    by = asked_as(settings(run, tmp_path), load_tokenizer(run / "tokenizer"))
    prompt = by.prompt(Asked(messages=[USER]))
    assert (prompt.text[-12:], prompt.suffix) == ("\n\nAssistant:", "\n")


def test_a_dialogue_that_the_template_refuses_is_named_by_its_line(folder, tmp_path):
    only = "{% if messages|length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}a"
    folder_of(folder, only)
    with pytest.raises(UserError, match=r'asked.jsonl:2: field "messages" is not taken: .*alone'):
        generate_text(settings(folder, tmp_path))
    generate_text(settings(folder, tmp_path, skip_bad_lines=True))
    assert len(answers(tmp_path / "out.jsonl")) == 2


def test_a_template_that_does_not_load_is_said_where_nobody_asked_for_it(folder, tmp_path, capsys):
    folder_of(folder, "{% if %}")
    generate_text(settings(folder, tmp_path))
    assert "WARNING: " in (said := capsys.readouterr().err)
    assert "does not load: Expected an expression, got 'end of statement block'; messages" in said
    with pytest.raises(UserError, match="does not load"):
        generate_text(settings(folder, tmp_path, chat="template", out=tmp_path / "other"))
