from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.data.tokenizer import load_tokenizer
from engine.huggingface.convert import convert
from engine.settings.convert import ConvertConfig
from tests.engine.huggingface.sentencepiece_models import KINDS, write_model
from tests.families import save_family, save_tokenizer
from tests.tiny import write_tokenizer

TEXT = "the mill\n  is a <cheap> pub 2026"


def exported(folder: Path, name: str = "qwen2") -> Path:
    """The folder that a run of that family and a tokenizer is exported to."""
    end = load_tokenizer(folder / "tokenizer").eos_id
    save_family(name, folder / "model", vocab_size=400, eos_token_id=end)
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / "model" / path.name)
    run, out = folder / "run", folder / "out"
    convert(ConvertConfig(direction="import", source=folder / "model", out=run))
    convert(ConvertConfig(direction="export", source=run, out=out))
    return out


def write_sentencepiece(folder: Path) -> None:
    write_model(folder / "tokenizer.model", **KINDS["llama"])


def write_unsplit(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)


@pytest.mark.parametrize("write", [write_sentencepiece, write_unsplit])
def test_another_tokenizer_than_qwens_is_said_to_be_read_otherwise(tmp_path, capsys, write):
    (tmp_path / "tokenizer").mkdir()
    write(tmp_path / "tokenizer")
    out = exported(tmp_path)
    assert "Load it with transformers.PreTrainedTokenizerFast" in capsys.readouterr().out
    ours = load_tokenizer(out).encode(TEXT)
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] != ours  # else: say no more
    plain = PreTrainedTokenizerFast.from_pretrained(out)
    assert plain(TEXT, add_special_tokens=False)["input_ids"] == ours


def test_qwens_own_tokenizer_is_read_as_it_is(tmp_path, capsys):
    save_tokenizer(tmp_path / "tokenizer")
    out = exported(tmp_path)
    assert "PreTrainedTokenizerFast" not in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == load_tokenizer(out).encode(TEXT)


def test_gpt2s_two_files_are_no_qwens(tmp_path, capsys):
    save_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizers.Tokenizer.from_file(str(file)).model.save(str(file.parent))
    file.unlink()
    out = exported(tmp_path)
    assert "PreTrainedTokenizerFast" in capsys.readouterr().out
    assert (out / "vocab.json").exists()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "pythia", "opt", "gpt2"])
def test_other_families_are_read_as_they_are(tmp_path, capsys, name):
    (tmp_path / "tokenizer").mkdir()
    write_sentencepiece(tmp_path / "tokenizer")
    out = exported(tmp_path, name)
    assert "PreTrainedTokenizerFast" not in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == load_tokenizer(out).encode(TEXT)
