from pathlib import Path

import pytest

from engine.errors import UserError
from engine.quickstart.files import find_files, is_tree, split_own_files, write_tokenizer
from tests.engine.quickstart.small_recipe import data_folder, tiny_config
from tests.tiny import write_lines


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
    with pytest.raises(UserError, match=r"train\.jsonl\.gz:2: none of the fields .*there is txt"):
        write_tokenizer(config, files, tmp_path / "tokenizer.model")


def flat_folder(folder: Path) -> Path:
    """The four files of README's "Your data", of few lines."""
    folder.mkdir()
    labels = {
        "demonstrations": {"response": "r"},
        "comparisons": {"completions": ["a", "b"], "ranks": [1, 2]},
        "prompts": {},
    }
    for name, label in labels.items():
        rows = ({"prompt": f"{name} {i}", **label} for i in range(20))
        write_lines(folder / f"{name}.jsonl", rows)
    (folder / "pretraining.txt").write_text("the river near the mill\n" * 40)
    return folder


def test_all_that_is_missing_of_a_folder_is_named_at_once(tmp_path: Path):
    data = flat_folder(tmp_path / "data")
    (data / "comparisons.jsonl").unlink()
    (data / "pretraining.txt").unlink()
    missing = "no comparisons.jsonl, no pretraining.jsonl or .txt"
    with pytest.raises(UserError, match=f"there is {missing}"):
        find_files(tiny_config(tmp_path / "run", data))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no demonstrations.* no comparisons.* no prompts"):
        find_files(tiny_config(tmp_path / "run", tmp_path / "empty"))
    tree = data_folder(tmp_path / "tree")
    (tree / "sft/e2e.train.jsonl").unlink()
    (tree / "prompts/e2e.val.jsonl").unlink()
    both = r"sft/e2e\*\.train\.jsonl\*, prompts/e2e\*\.val\.jsonl\*; .* 'e2e' by --task"
    with pytest.raises(UserError, match=both):
        find_files(tiny_config(tmp_path / "run", tree))


def test_a_flat_folder_is_split_into_the_runs_own(tmp_path: Path):
    config = tiny_config(tmp_path / "run", flat_folder(tmp_path / "data"))
    assert not is_tree(config.data)
    assert is_tree(data_folder(tmp_path / "tree"))
    for name in ("demonstrations", "comparisons", "prompts"):  # a tree has the last two as well
        (tmp_path / "folders" / name).mkdir(parents=True)
    assert not is_tree(tmp_path / "folders")
    files = find_files(config)
    assert files.pretraining == tmp_path / "run/data/pretraining.txt"
    split_own_files(config, files)
    assert files.has_comparisons()
    num_lines = [
        len(path.read_text().splitlines()) for path in (files.prompts, files.prompts_valid)
    ]
    assert sum(num_lines) == 20 and min(num_lines) >= 1
    write_tokenizer(config, files, tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").exists()


def test_a_tree_is_not_split_again(tmp_path: Path):
    config = tiny_config(tmp_path / "run", data_folder(tmp_path / "data"))
    split_own_files(config, find_files(config))
    assert not (tmp_path / "run").exists()
