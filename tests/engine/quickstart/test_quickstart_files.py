from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.files import find_files, write_tokenizer
from tests.engine.quickstart.small_recipe import data_folder, tiny_config


def test_a_missing_file_is_named_before_anything_is_trained(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    (data / "comparisons/e2e.val.jsonl").unlink()
    with pytest.raises(UserError, match=r"data: no file matches comparisons/e2e\*\.val\.jsonl\*"):
        find_files(tiny_config(tmp_path / "run", data))


def test_files_of_another_task_are_not_taken(tmp_path: Path):
    data = data_folder(tmp_path / "data")
    with pytest.raises(UserError, match=r"no file matches sft/chat\*\.train"):
        find_files(tiny_config(tmp_path / "run", data, task="chat"))


def test_comparisons_are_there_with_both_of_their_files(tmp_path: Path):
    files = find_files(tiny_config(tmp_path / "run", data_folder(tmp_path / "data")))
    assert files.has_comparisons()
    for path in (files.comparisons, files.comparisons_valid):
        text = path.read_text()
        path.unlink()
        assert not files.has_comparisons()
        path.write_text(text)


def test_a_bad_line_of_pretraining_text_is_named_by_the_tokenizers_training(tmp_path: Path):
    config = tiny_config(tmp_path / "run", data_folder(tmp_path / "data"))
    files = find_files(config)
    files.pretraining.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl\.gz:2: field \"text\" is missing"):
        write_tokenizer(config, files, tmp_path / "tokenizer.model")
