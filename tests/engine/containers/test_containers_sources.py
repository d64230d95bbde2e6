import os
from pathlib import Path

import pytest

from engine.containers.sources import DataSource, one_source, sources_of
from engine.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b/2.parquet", "b/10.parquet", "c/x.csv", "odd,name@2.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    return tmp_path


def listed(text: str) -> list[tuple[list[str], float]]:
    return [([str(f) for f in s.files], s.weight) for s in sources_of(Path(text))]


def test_a_path_is_a_file_a_folder_or_a_list(folder: Path):
    assert listed("a.jsonl") == [(["a.jsonl"], 1.0)]
    assert listed("c") == [(["c/x.csv"], 1.0)]
    assert listed("odd,name@2.jsonl") == [(["odd,name@2.jsonl"], 1.0)]  # there is such a file
    assert listed("a.jsonl@2, b/*.parquet@.5,c") == [
        (["a.jsonl"], 2.0),
        (["b/10.parquet", "b/2.parquet"], 0.5),
        (["c/x.csv"], 1.0),
    ]
    assert listed("[a,b].jsonl") == listed("**/a.jsonl") == [(["a.jsonl"], 1.0)]
    assert [source.name for source in sources_of("a.jsonl@2,c")] == ["a.jsonl@2", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*.zst", r"\*\.zst: no file matches"),
        ("a.jsonl,", "a name is missing beside a comma"),
        ("a.jsonl,,c", "a name is missing beside a comma"),
        ("a.jsonl@0", "a weight must be over 0 and at most 1000, got 0"),
        ("a.jsonl@2000", "a weight must be over 0 and at most 1000, got 2000"),
        ("a.jsonl,*.jsonl", "a.jsonl is named twice, by a.jsonl and .*write @2 behind its name"),
        ("a.json", "a.json: no such file or folder; . has a.jsonl"),
        ("x/a.json", "x/a.json: no such file or folder; the folder x does not exist"),
        ("stanfordnlp/SHP", "`hf download --repo-type dataset stanfordnlp/SHP` fetches it"),
        ("https://host/a.jsonl", "is an address, and nothing here uses the network: fetch it your"),
        ("s3://bucket/a.jsonl", "is an address"),
        ("hf://datasets/a/b", "fetch it by `hf download --repo-type dataset OWNER/NAME`"),
        ("~/a.jsonl", "begins with ~, which the shell leaves as it is .*: write /.*/a.jsonl"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(folder: Path, text: str, said: str):
    for path in (Path(text), text):
        with pytest.raises(UserError, match=said):
            sources_of(path)


def test_a_link_to_nothing_is_one(folder: Path):
    os.symlink("nowhere", "link.jsonl")
    assert listed("link.jsonl") == [(["link.jsonl"], 1.0)]  # as opening it says


def test_a_weight_is_passes_and_a_share_of_the_prompts():
    source = DataSource(name="a", files=(), weight=2.25)
    assert source.num_passes == 2
    prompts = [f"prompt {number}" for number in range(4000)]
    chosen = [prompt for prompt in prompts if source.has_once_more(prompt)]
    assert 900 < len(chosen) < 1100
    assert chosen == [p for p in reversed(prompts) if source.has_once_more(p)][::-1]
    half = DataSource(name="b", files=(), weight=0.5)
    assert all(half.has_once_more(prompt) for prompt in chosen)  # more of them, and none is lost
    # sha256("weight prompt N") below half of its range: the same on any machine, at any time.
    assert [n for n in range(10) if half.has_once_more(f"prompt {n}")] == [3, 5]
    assert not any(DataSource(name="c", files=(), weight=3.0).has_once_more(p) for p in prompts)


def test_files_that_are_read_once_have_no_weights(folder: Path):
    assert one_source("a.jsonl,c").files == (Path("a.jsonl"), Path("c/x.csv"))
    with pytest.raises(UserError, match="a.jsonl@2: a weight has no sense here"):
        one_source("a.jsonl@2,c")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jsonl@", "'' is no weight of a.jsonl; write @2"),
        ("a.jsonl@-1", "'-1' is no weight of a.jsonl"),
        ("b.jsonl,a.jsonl@x", "'x' is no weight of a.jsonl"),
        ("a.jsonl b.jsonl", "a.jsonl b.jsonl: several files are joined by commas"),
        ("a.jsonl; b.jsonl", "several files are joined by commas"),
        ("a.jsonl@0", "a weight must be over 0"),
    ],
)
def test_a_list_that_is_written_otherwise_is_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
):
    monkeypatch.chdir(tmp_path)
    for each in ("a.jsonl", "b.jsonl"):
        (tmp_path / each).write_text("{}")
    with pytest.raises(UserError) as error:
        sources_of(name)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["a@b.jsonl", "a@2", "a, b.jsonl", "[1].jsonl", "a b*.jsonl"])
def test_a_file_of_that_very_name_is_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{}")
    (source,) = sources_of(name)
    assert (source.files, source.weight) == ((Path(name),), 1.0)
