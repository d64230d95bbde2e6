from pathlib import Path

import pytest

from engine.config import UserError, load_config
from engine.data.tokenizer import load_tokenizer
from engine.run import Run, require_path, size_named, start_run
from engine.settings.layout import ParallelLayout
from engine.settings.sft import SFTConfig
from models.sizes import SIZES


def start(tokenizer: Path, directory: Path) -> Run:
    return start_run(directory=directory, layout=ParallelLayout(), seed=7, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "policy", "policy/tokenizer"])
def test_tokenizer_comes_from_a_file_a_folder_or_an_earlier_run(
    name: str, tiny: Path, tmp_path: Path
):
    run = start(tiny / name, tmp_path / "run")
    assert run.tokenizer.fingerprint() == load_tokenizer(tiny / "tokenizer.json").fingerprint()
    assert run.parallel.seed == 7
    assert run.checkpoints == tmp_path / "run" / "checkpoints"


def test_settings_are_written_when_the_stage_says_so(tiny: Path, tmp_path: Path):
    run = start(tiny / "policy", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = SFTConfig(directory=tmp_path / "run", seed=7)
    run.write_settings(config)
    assert load_config(SFTConfig, tmp_path / "run" / "config.json") == config
    saved = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert saved.fingerprint() == run.tokenizer.fingerprint()


def test_missing_tokenizer_leaves_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.model: no such file"):
        start(tmp_path / "nowhere.model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_size_takes_the_tokenizers_vocabulary(tiny: Path):
    tokenizer = load_tokenizer(tiny / "tokenizer.json")
    size = size_named("125m", tokenizer)
    assert size.vocab_size == tokenizer.vocab_size == 100
    assert size.context_length == SIZES["125m"].context_length
    assert size_named("125m", tokenizer, 128).context_length == 128


def test_unknown_size_is_an_error_that_lists_them(tiny: Path):
    with pytest.raises(UserError, match="no size is named '1.3B'.*1.3b, .*175b"):
        size_named("1.3B", load_tokenizer(tiny / "tokenizer.json"))


def test_required_path(tmp_path: Path):
    assert require_path(tmp_path, "policy") == tmp_path
    with pytest.raises(UserError, match="--policy is required"):
        require_path(None, "policy")
    with pytest.raises(UserError, match="--policy .*/nothing: no such file or folder"):
        require_path(tmp_path / "nothing", "policy")
