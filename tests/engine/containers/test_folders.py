import json
from pathlib import Path

import pyarrow as pa
import pytest

from engine.containers.folders import files_of_folder, has_split
from engine.containers.sources import sources_of
from engine.errors import UserError


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(folder: Path, split: str | None = None) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_of_folder(folder, split)]


def save_to_disk(folder: Path, num_files: int = 2) -> Path:
    """Write a folder as datasets.save_to_disk does, version 4: its files, and their metadata."""
    folder.mkdir(parents=True)
    files = [f"data-{n:05}-of-{num_files:05}.arrow" for n in range(num_files)]
    for number, name in enumerate(files):
        table = pa.table({"prompt": [f"prompt {number}"], "response": ["b"]})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as w,
        ):
            w.write_table(table)
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": "a1b2",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path: Path):
    folder = save_to_disk(tmp_path / "saved")
    made(folder, "cache-a1b2.arrow")  # of datasets.map, and no part of it
    assert names(folder) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    state = json.loads((folder / "state.json").read_text())
    for change, said in (
        ({"_data_files": []}, "names no _data_files"),
        ({"_data_files": [{"filename": "../a.arrow"}]}, "_data_files must name files beside it"),
        ({"_data_files": [3]}, "_data_files must name files beside it"),
        ({"_indices_data_files": [{"filename": "b"}]}, "save it again by datasets.flatten_indices"),
    ):
        (folder / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=said):
            names(folder)


def test_splits_of_a_saved_dictionary_are_named(tmp_path: Path):
    folder = tmp_path / "saved"
    save_to_disk(folder / "train", 1)
    save_to_disk(folder / "test", 1)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError) as error:
        names(folder)
    assert str(error.value) == (
        f"{folder} is a folder of several splits (train, test): name one, such as {folder}/train"
    )
    assert names(folder / "test") == ["data-00000-of-00001.arrow"]


def test_a_clone_of_the_hub_is_read_split_by_split(tmp_path: Path):
    folder = made(
        tmp_path / "clone",
        *("README.md", ".gitattributes", ".git/objects/a.json", "dataset_infos.json"),
        *("data/train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-0a1b.parquet"),
        "data/test_sft-00000-of-00001.parquet",
    )
    with pytest.raises(UserError, match=r"several splits \(test_sft, train\): name one, such as"):
        names(folder)
    train = [f"data/train-0000{n}-of-00002-0a1b.parquet" for n in range(2)]
    assert names(folder, "train") == train
    for path in (folder / "train", folder / "data" / "train"):
        [source] = sources_of(path)
        assert source.files == tuple(folder / name for name in train)
    assert has_split(folder, "test_sft") and not has_split(folder, "valid")
    (folder / train[0]).unlink()
    with pytest.raises(UserError, match="has 1 of 2 parts of train, and not part 0: download it"):
        sources_of(folder / "train")


def test_splits_by_the_names_of_files_and_folders(tmp_path: Path):
    folder = made(tmp_path / "a", "oasst.train.jsonl.gz", "oasst.val.jsonl.gz")
    with pytest.raises(UserError, match=r"\(train, val\)"):
        names(folder)
    folder = made(tmp_path / "b", "train/a.csv", "train/b.csv", "test/a.csv")
    with pytest.raises(UserError, match=r"\(test, train\)"):
        names(folder)
    assert names(folder, "train") == ["train/a.csv", "train/b.csv"]
    assert names(folder / "test") == ["a.csv"]


def test_a_folder_has_files_of_one_kind(tmp_path: Path):
    folder = made(tmp_path / "a", "b.jsonl", "a.json.zst", ".c.jsonl", "README.md", "notes.txt")
    assert names(folder) == ["a.json.zst", "b.jsonl"]
    made(folder, "c.parquet")
    with pytest.raises(UserError, match=r"files of several kinds \(JSON, parquet\): name those"):
        names(folder)
    assert names(made(tmp_path / "b", "z.txt", "a.md", "README.md", "LICENSE")) == ["a.md", "z.txt"]
    with pytest.raises(UserError, match="a folder without data: no file in it ends in .jsonl"):
        names(made(tmp_path / "c", "README.md", "model.bin"))


def test_files_of_several_folders_are_not_joined(tmp_path: Path):
    folder = made(tmp_path / "a", "main/a.jsonl", "other/a.jsonl")
    with pytest.raises(UserError, match=r"data in several folders: name one of .*main, .*other"):
        names(folder)
    assert names(made(tmp_path / "b", "snapshots/0a1b/data/x.parquet")) == [
        "snapshots/0a1b/data/x.parquet"
    ]


@pytest.mark.parametrize(
    ("files", "listed", "example"),
    [
        (("more.jsonl", "my_test_prompts.jsonl"), "more.jsonl, test", "more.jsonl"),
        (("extra.jsonl", "test.jsonl", "train.jsonl"), "extra.jsonl, test, train", "train"),
        (
            ("data/a-00000-of-00001.parquet", "data/b-00000-of-00001.parquet"),
            "data/a-*, data/b-*",
            "data/a-*",
        ),
    ],
)
def test_the_split_that_an_error_names_is_there(
    tmp_path: Path, files: tuple[str, ...], listed: str, example: str
):
    folder = made(tmp_path / "a", *files)
    with pytest.raises(UserError) as error:
        names(folder)
    assert str(error.value) == (
        f"{folder} is a folder of several splits ({listed}): name one, such as {folder}/{example}"
    )
    for part in listed.split(", "):
        assert len(sources_of(folder / part)[0].files) == 1


def test_the_folders_that_an_error_names_can_be_named(tmp_path: Path):
    folder = made(tmp_path / "a", "train/a.jsonl", "train/sub/b.jsonl")
    with pytest.raises(UserError, match=r"name one of .*/train/\*\.jsonl, .*/train/sub$"):
        names(folder)
    assert len(sources_of(folder / "train/*.jsonl")[0].files) == 1


def test_a_saved_set_of_one_split_is_that_split(tmp_path: Path):
    save_to_disk(tmp_path / "train", 1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert files_of_folder(tmp_path) == files_of_folder(tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../train"]}')
    with pytest.raises(UserError, match="several splits"):
        files_of_folder(tmp_path)
