"""The documents' table of containers is what reading each of them gives."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.containers.rows import read_rows
from engine.containers.sources import sources_of
from engine.errors import UserError
from tests.engine.containers.test_folders import made, save_to_disk
from tests.engine.containers.test_refused import KINDS
from tests.engine.containers.test_rows import COLUMNAR, PACKINGS, TEXTS
from tests.sources import ROOT

BEGIN, END = "<!-- containers: from test_container_table.py -->", "<!-- end of containers -->"


def outcome(path: Path, folder: Path) -> str:
    """Return how the last row of what is at a path is named, or why there is none."""
    try:
        rows = [where for s in sources_of(path) for file in s.files for where, _ in read_rows(file)]
    except UserError as error:
        return f"refused: {str(error).replace(f'{folder}/', '')}"
    return f"read: `{rows[-1].replace(f'{folder}/', '')}`"


def cases(folder: Path) -> Iterator[tuple[str, Path]]:
    for form, (ending, content) in {**TEXTS, **COLUMNAR}.items():
        (folder / f"a{ending}").write_bytes(content)
        yield form, folder / f"a{ending}"
    (folder / "a.txt").write_text("What is a?\nWhat is b?\n")
    yield "plain text, a prompt a line (as pretraining text: one document)", folder / "a.txt"
    row = {"row_idx": 0, "row": {"prompt": "a"}, "truncated_cells": []}
    (folder / "a.json").write_text(json.dumps({"features": [{"name": "prompt"}], "rows": [row]}))
    yield "rows of the viewer on Hugging Face's hub", folder / "a.json"
    for packing, pack in list(PACKINGS.items())[1:]:
        (folder / "a.jsonl").write_bytes(pack(TEXTS["JSON lines"][1]))
        yield f"any of these texts packed by {packing}", folder / "a.jsonl"
    yield "a folder of datasets' save_to_disk", save_to_disk(folder / "saved")
    save_to_disk(folder / "splits" / "train", 1)
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    yield "the same with splits", folder / "splits"
    yield "one of its splits", folder / "splits" / "train"
    content = COLUMNAR["parquet"][1]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        made(folder / "clone/data", f"{name}.parquet")
        (folder / f"clone/data/{name}.parquet").write_bytes(content)
    yield "a clone of a data set on the hub", folder / "clone"
    yield "one of its splits, which names a folder of no such name", folder / "clone" / "train"
    for kind, (content, _) in KINDS.items():
        (folder / "a.data").write_bytes(content)
        yield kind, folder / "a.data"
    yield "a name on the hub", Path("stanfordnlp/SHP")
    yield "an address", Path("s3://bucket/train.jsonl")


def table(folder: Path) -> str:
    lines = ["| what is named | what comes of it |", "| --- | --- |"]
    for what, path in cases(folder):
        lines.append(f"| {what} | {outcome(path, folder)} |")
    return "\n".join(lines)


def test_readme_has_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    wanted = table(tmp_path)
    text = (ROOT / "recipes" / "DATA.md").read_text()
    found = text.partition(BEGIN + "\n")[2].partition("\n" + END)[0]
    assert found == wanted, f"put this into recipes/DATA.md:\n{wanted}"
