import shutil
from pathlib import Path

import pytest

from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.huggingface.convert import convert
from engine.huggingface.folder_tokenizer import check_own_tokenizer, warn_of_own_tokenizer
from engine.settings.convert import ConvertConfig
from tests.families import save_family
from tests.tiny import SIZE, rm_config, train, write_tokenizer


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
