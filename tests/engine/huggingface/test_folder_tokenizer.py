import json
import shutil
from pathlib import Path

import pytest

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.huggingface.convert import convert
from engine.huggingface.folder_tokenizer import (
    check_own_tokenizer,
    template_notes,
    warn_of_own_tokenizer,
)
from engine.settings.convert import ConvertConfig
from tests.families import save_family
from tests.tiny import SIZE, rm_config, train, write_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
# Where transformers' save_pretrained and earlier ones of it put a chat template.
TEMPLATES = {
    "chat_template.jinja": TEMPLATE,
    "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}),
    "special_tokens_map.json": json.dumps({"pad_token": "<|endoftext|>"}),
}
LISTED = json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_family("llama", tmp_path / "llama", vocab_size=SIZE.vocab_size)
    write_tokenizer(tmp_path / "llama" / "tokenizer.json", vocab_size=SIZE.vocab_size)
    return tmp_path / "llama"


def test_a_folders_own_tokenizer_is_the_runs_or_refused_or_not_there(folder, tmp_path, capsys):
    own = load_tokenizer(folder)
    other = load_tokenizer(write_tokenizer(tmp_path / "other.json", vocab_size=90))
    check_own_tokenizer(folder, own)
    warn_of_own_tokenizer(folder, own)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="its tokenizer is another than this run's .*other.json"):
        check_own_tokenizer(folder, other)
    warn_of_own_tokenizer(folder, other)
    assert f"--tokenizer {other.path} is another tokenizer than that in {folder}" in (
        capsys.readouterr().err
    )
    (folder / "tokenizer.json").unlink()
    warn_of_own_tokenizer(folder, other)
    assert capsys.readouterr().err == ""
    check_own_tokenizer(folder, other)
    assert "nothing says whether" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "is_said"),
    [*((name, text, "template" in text or "jinja" in name) for name, text in TEMPLATES.items())]
    + [("tokenizer_config.json", LISTED, True)],
)
def test_a_chat_template_wherever_it_lies_is_noted(folder, name, text, is_said):
    assert template_notes(load_tokenizer(folder), "goes along") == []
    (folder / name).write_text(text)
    notes = [f"{folder / 'tokenizer.json'}: its chat template goes along"] if is_said else []
    assert template_notes(load_tokenizer(folder), "goes along") == notes


def test_a_stage_and_an_export_say_what_becomes_of_it_once(folder, tiny, tmp_path, capsys):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    train(rm_config(tiny, tmp_path / "rm", init_from=folder, epochs=0.3))
    said = "its chat template is kept and exported, not applied: messages go in as turns"
    assert capsys.readouterr().out.count(said) == 1
    convert(ConvertConfig(direction="export", source=tmp_path / "rm", out=tmp_path / "out"))
    assert capsys.readouterr().out.count("its chat template goes along") == 1
    assert (tmp_path / "out" / "tokenizer_config.json").read_text().count("chat_template") == 1


def test_another_tokenizer_that_was_chosen_is_warned_of(folder, tiny, tmp_path, capsys):
    other = write_tokenizer(tmp_path / "other.json", vocab_size=90)
    config = ConvertConfig(direction="import", source=folder, out=tmp_path / "run", tokenizer=other)
    convert(config)
    said = f"--tokenizer {other} is another tokenizer than that in {folder}"
    assert said in capsys.readouterr().err
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    train(rm_config(tiny, tmp_path / "rm", init_from=again, tokenizer=other, epochs=0.3))
    assert f"is another tokenizer than that in {again}" in capsys.readouterr().err


def test_a_conversion_the_wrong_way_is_said_to_be_one(folder, tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="llama is a Hugging Face folder already"):
        convert(ConvertConfig(direction="export", source=folder, out=out))
    with pytest.raises(UserError, match="policy is a run of ours or a part of one, and no folder"):
        convert(ConvertConfig(direction="import", source=tiny / "policy", out=out))
    convert(ConvertConfig(direction="import", source=folder, out=tmp_path / "run"))
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000000"):
        with pytest.raises(UserError, match="is a run of ours or a part of one, and no folder"):
            convert(ConvertConfig(direction="import", source=source, out=out))
