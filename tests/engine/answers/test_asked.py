"""Which form messages are read in, and that a model answers as transformers has it answer."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.answers.answer import generate_text
from engine.answers.asked import chosen_template, tokens_of_dialogue
from engine.data.demonstrations import demonstration_examples, read_demonstrations
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


def test_a_run_is_asked_in_turns_unless_told_otherwise(folder, tiny, tmp_path):
    run = shutil.copytree(tiny / "policy", tmp_path / "run")
    tokenizer = load_tokenizer(folder)
    assert chosen_template(settings(folder, tmp_path), tokenizer) is not None
    assert chosen_template(settings(folder, tmp_path, chat="turns"), tokenizer) is None
    assert chosen_template(settings(run, tmp_path), tokenizer) is None
    assert chosen_template(settings(run, tmp_path, chat="template"), tokenizer) is not None
    own = load_tokenizer(run / "tokenizer")
    with pytest.raises(UserError, match="has no chat template"):
        chosen_template(settings(run, tmp_path, chat="template"), own)


def test_a_dialogue_speaks_the_template(folder, tmp_path, monkeypatch, capsys):
    lines = iter([USER["content"].replace("\n", " ")])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or end_of_input())
    asked = []
    template = type(chosen_template(settings(folder, tmp_path), load_tokenizer(folder)))
    prompt = template.prompt
    monkeypatch.setattr(template, "prompt", lambda *a: asked.append(list(a[1])) or prompt(*a))
    generate_text(settings(folder, tmp_path, prompts=None))
    assert [message["role"] for message in asked[0]] == ["user"]


def end_of_input() -> str:
    raise EOFError


def test_turns_have_the_tokens_that_training_gives_them(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny / "policy" / "tokenizer")
    reply = {"role": "assistant", "content": "Little."}
    dialogues = [{"messages": [*messages, reply]} for messages in DIALOGUES]
    trained, _ = read_demonstrations(write_lines(tmp_path / "trained.jsonl", dialogues))
    examples, _ = demonstration_examples(trained, tokenizer, max_length=999, prompt_suffix=" the ")
    for messages, example in zip(DIALOGUES, examples, strict=True):
        asked = tokens_of_dialogue(messages, tokenizer, None, " the ")
        assert asked.tolist() == example.tokens[: example.prompt_length].tolist()
    assert len(asked) > len(tokens_of_dialogue(messages, tokenizer, None, ""))


def test_a_dialogue_that_the_template_refuses_is_named_by_its_line(folder, tmp_path):
    only = "{% if messages|length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}a"
    folder_of(folder, only)
    with pytest.raises(
        UserError, match=r'asked.jsonl:2: field "messages" is not answered: .*alone'
    ):
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
