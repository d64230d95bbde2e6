import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from engine.containers import json_values
from engine.containers.json_values import list_field
from engine.containers.rows import read_rows
from engine.errors import UserError
from tests.engine.containers.test_rows import read
from tests.engine.shapes.shape_samples import SAMPLES, Sample


def test_records_are_named_by_number_and_line(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('\n[\n {"a": 1,\n  "b": null},\n 3, {}]\n')
    assert read(path) == (
        [": record 1 (line 3)", ": record 2 (line 5)", ": record 3 (line 5)"],
        [{"a": 1}, "must be one JSON object, not a number", {}],
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "a.json:3: not JSON: Expecting ':' delimiter, at the middle"),
        ('[\n{"a": 1}', "a.json:2: not JSON: the file ends where ']' should be"),
        ('[\n{"a": 1}\n{"b": 2}]', "a.json:3: not JSON: '{' is where ']' should be"),
        ('[\n{"a": 1},\n]', "a.json:3: a comma before the end of the list"),
        ('[\n{"a": "b', "a.json:2: not JSON: Unterminated string"),
        ('[\n{"a": 1}]\n{"b": 2}', "a.json:3: more follows the list"),
        ('[{"a": ' + "[" * 100_000 + "\n", "a.json:1: not JSON that can be read"),
        ('[{"a": ' + "1" * 5_000 + "}\n", "a.json:1: not JSON that can be read"),
        (
            '{"data": [{"a": 1}],\n "more": [{"a": 1}]}',
            '"data" and "more" are two lists of objects',
        ),
        ('{"data": [{"a": 1}],\n "n": }', "a.json:2: not JSON: Expecting value"),
        ('{\n"a": 1\n}\n{\n"a": \n}', "a.json:6: not JSON: Expecting value"),
    ],
)
def test_broken_json_is_named_by_its_line(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert problem in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 64])
def test_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int):
    rows = [{"é": ["a\n\U0001f600", 123456, True, None, {"b": -1.5e3}]}, {}, {"c": '"]}'}]
    forms = {
        "list": json.dumps(rows, ensure_ascii=False, indent=1),
        "objects": "\n".join(json.dumps(row, indent=2) for row in rows),
        "object": json.dumps({"n": 1234, "data": rows, "z": [1, 2]}, indent=1),
    }
    path = tmp_path / "a.json"
    for text in forms.values():
        path.write_text("\ufeff" + text, encoding="utf-8")
        whole = read(path)
        monkeypatch.setattr(json_values, "_PART_BYTES", part_bytes)
        assert read(path) == whole
        assert whole[1] == rows
        monkeypatch.undo()


def test_a_list_of_any_length_takes_the_memory_of_a_record(tmp_path: Path):
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"version": "1", "rows": [')
        for number in range(60_000):
            stream.write(b", " * bool(number) + json.dumps({"text": f"{number} " * 60}).encode())
        stream.write(b"]}")
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000
    assert peak_bytes < 150 << 20  # of 25 MB, of which 16 MiB are looked at to know the form


def test_a_huge_record_and_empty_space_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_values, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(json_values, "MAX_EMPTY_BYTES", 1 << 16)
    monkeypatch.setattr(json_values, "_PART_BYTES", 1 << 12)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": "' + "x" * (1 << 18) + '"}]')
    with pytest.raises(UserError, match=r"a\.json:2: a record of over 65536 bytes begins here"):
        list(read_rows(path))
    path.write_text('[{"a": 1},' + "\n " * (1 << 17) + "{}]")
    with pytest.raises(UserError, match=r"a\.json:\d+: \d+ bytes to here are empty"):
        list(read_rows(path))


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"a": 1},\n{"a": "\xe9"}]')
    with pytest.raises(UserError, match=r"a\.json:3: not UTF-8 \(Latin-1 or"):
        list(read_rows(path))


def test_the_field_with_the_rows_is_told_from_a_rows_own_lists():
    assert list_field({"version": "1", "data": [{"a": 1}]}) == "data"
    assert list_field({"rows": [{"a": 1}], "num": 1}) == "rows"
    assert list_field({"train": [{}], "test": [{}]}) == "train"  # which is refused as it is read
    assert list_field({"messages": [{"role": "user"}]}) == ""
    assert list_field({"prompt": "a", "answers_of_models": [{"text": "b"}]}) == ""
    assert list_field({"completions": ["a"], "ranks": [1]}) == ""
    assert list_field({"data": ["a"]}) == ""
    assert list_field({}) == ""


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.format)
def test_a_published_row_alone_is_no_object_around_rows(sample: Sample):
    assert {list_field(row) for row in sample.rows} == {""}


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_of_the_hubs_viewer_are_read_and_cut_ones_are_bad(tmp_path: Path, indent: int | None):
    rows = [
        {"row_idx": 0, "row": {"prompt": "a", "row": None}, "truncated_cells": []},
        {"row_idx": 1, "row": {"prompt": "b"}, "truncated_cells": ["prompt"]},
    ]
    page = {"features": [{"name": "prompt"}], "rows": rows, "num_rows_total": 2}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(page, indent=indent))
    _, (first, second) = read(path)
    assert first == {"prompt": "a"}
    assert second.startswith("the hub's viewer has cut ['prompt'] short: download")
