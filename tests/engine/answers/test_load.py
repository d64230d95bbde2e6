import shutil
from pathlib import Path

import pytest

from engine.answers.answer import generate_text
from engine.answers.load import load_model
from engine.checkpoints.found import find_network
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from tests.engine.answers.answering import answers, config
from tests.tiny import SIZE, write_tokenizer


def test_a_huggingface_folder_answers_too(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)
    generate_text(config(folder, tmp_path))
    assert len(answers(tmp_path / "out.jsonl")) == 3  # its context is longer


@pytest.mark.parametrize("role", ["ema", "critic"])
def test_a_role_of_a_huggingface_folder_is_refused(gpt2_folder, tmp_path, role):
    with pytest.raises(UserError, match=f"--role {role}: .* holds one model; leave --role out"):
        load_model(config(gpt2_folder, tmp_path, role=role))
    with pytest.raises(UserError, match="is a file: give its folder"):
        load_model(config(gpt2_folder / "model.safetensors", tmp_path, role=role))


def test_a_tokenizer_that_is_not_a_folders_own_is_warned_of(gpt2_folder, tmp_path, capsys):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)
    other = write_tokenizer(tmp_path / "other.json", vocab_size=90)
    load_model(config(folder, tmp_path, tokenizer=folder / "tokenizer.json"))
    assert "WARNING" not in capsys.readouterr().err
    load_model(config(folder, tmp_path, tokenizer=other))
    said = f"--tokenizer {other} is another tokenizer than that in {folder}"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="--tokenizer gpt2: no such file or folder; if that is a"):
        load_model(config(folder, tmp_path, tokenizer=Path("gpt2")))


def test_a_run_may_be_named_for_its_tokenizer(gpt2_folder, run, tmp_path):
    loaded = load_model(config(gpt2_folder, tmp_path, tokenizer=run / "policy"))[1]
    assert loaded.path.parent == run / "policy" / "tokenizer"


def test_a_runs_tokenizer_is_loaded_with_it_and_another_is_refused(run, tmp_path):
    settings = config(run / "policy", tmp_path)
    network, tokenizer = load_model(settings)
    assert (network.kind, network.size) == ("language", SIZE)
    assert tokenizer.fingerprint() == load_tokenizer(run / "tokenizer.json").fingerprint()
    checkpoint = find_network(run / "policy", "policy")
    of_a_network = load_model(config(checkpoint, tmp_path))  # its run's tokenizer is found
    assert of_a_network[1].fingerprint() == tokenizer.fingerprint()
    other = write_tokenizer(tmp_path / "tokenizer.json", vocab_size=90)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_model(config(run / "policy", tmp_path, tokenizer=other))


def test_a_source_without_the_role_is_an_error_that_names_what_it_holds(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of a policy here; it holds reward_model"):
        load_model(config(run / "reward_model", tmp_path))
    with pytest.raises(UserError, match="--source .*nowhere: no such file or folder"):
        load_model(config(run / "nowhere", tmp_path))
