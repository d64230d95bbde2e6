import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.containers import kinds
from engine.containers.kinds import ending_of, kind_of
from engine.containers.rows import read_rows
from engine.errors import UserError

ROW = {"prompt": "a", "response": "b"}
GOOD = json.dumps(ROW)


def kind(folder: Path, content: str, name: str = "a.jsonl") -> tuple[str, str]:
    (folder / name).write_text(content)
    return kind_of(folder / name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *((text, ("lines", "")) for text in ("", "\n", "x", GOOD, f"{GOOD}\n{GOOD}\n")),
        # A bad first line is no reason to read the file as anything else.
        *((f"{bad}\n{GOOD}\n", ("lines", "")) for bad in ("{", '{"a": 1', '{"a": ', "[1]", "{]")),
        *((f"{bad}\n{GOOD}\n", ("lines", "")) for bad in ('{"a": [{"b": 1},', '{"a": "', "[]")),
        ("{\n" * 100 + GOOD, ("lines", "")),
        (json.dumps([ROW]), ("values", "list")),
        (json.dumps([ROW, ROW], indent=2), ("values", "list")),
        ("[", ("values", "list")),
        (json.dumps(ROW, indent=2), ("values", "objects")),
        (json.dumps(ROW, indent=2) * 2, ("values", "objects")),
        (json.dumps(ROW, indent=2)[:-5], ("values", "objects")),
        (GOOD + "\r" + GOOD + "\r", ("values", "objects")),
        (json.dumps({"data": [ROW]}), ("values", "object")),
        (json.dumps({"data": [ROW]}, indent=1), ("values", "object")),
        (json.dumps({"messages": [ROW]}, indent=1), ("values", "objects")),
        (json.dumps({"messages": [ROW]}), ("lines", "")),
        ('{"data": [\n{"prompt": "a"}\n]}', ("values", "object")),
    ],
)
def test_json_is_told_by_its_content(tmp_path: Path, content: str, expected: tuple[str, str]):
    assert kind(tmp_path, content) == expected
    assert kind(tmp_path, "\ufeff" + content, "a.csv") == expected or not content.strip("\nx")


def test_an_object_of_any_length_has_its_rows_in_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kinds, "MAX_LINE_BYTES", 100)
    assert kind(tmp_path, json.dumps({"data": [ROW] * 50})) == ("values", "object")
    assert kind(tmp_path, json.dumps({"data": [ROW] * 50}, indent=1)) == ("values", "object")
    assert kind(tmp_path, "\n".join([GOOD] * 50)) == ("lines", "")


def test_a_table_is_told_by_its_name_or_its_tabs(tmp_path: Path):
    assert kind(tmp_path, "prompt,response\n", "a.csv") == ("delimited", ",")
    assert kind(tmp_path, "prompt\tresponse\n", "a.csv") == ("delimited", "\t")
    assert kind(tmp_path, "prompt\n", "a.tsv.gz") == ("delimited", "\t")
    assert kind(tmp_path, "id\tprompt\n", "a.data") == ("delimited", "\t")
    assert kind(tmp_path, "hello, world\n") == ("lines", "")


@pytest.mark.parametrize("name", ["a.jsonl", "a", "a.txt", "a.parquet", "a.json"])
def test_a_table_with_names_that_are_known_is_one_by_any_name(tmp_path: Path, name: str):
    assert kind(tmp_path, "prompt,response\na,b\n", name) == ("delimited", ",")
    assert kind(tmp_path, '"question";"id"\n', name) == ("delimited", ";")
    assert kind(tmp_path, "prompt\tresponse\rx", name) == ("delimited", "\t")
    assert kind(tmp_path, "my prompt, response\n", "a.jsonl") == ("lines", "")
    assert kind(tmp_path, "text, and more text\n", "a.txt") == ("prompts", "")
    assert kind(tmp_path, "prompt,response\n", "a.tsv") == ("delimited", ",")


def test_a_name_that_its_content_does_not_have_is_said(tmp_path: Path):
    assert kind(tmp_path, GOOD, "a.parquet") == ("lines", "")
    with pytest.raises(UserError, match=r"called \.arrow, and is no such file, or a damaged one"):
        kind(tmp_path, "some text", "a.arrow")


def test_packed_parquet_is_to_be_unpacked(tmp_path: Path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.gz is parquet packed by gzip: unpack it"):
        kind_of(tmp_path / "a.gz")


def test_columns_of_pandas_are_refused(tmp_path: Path):
    columns = {"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}}
    split = {"columns": ["prompt", "response"], "index": [0], "data": [["a", "c"]]}
    for indent, table in itertools.product((None, 1), (columns, split)):
        (tmp_path / "a.json").write_text(json.dumps(table, indent=indent))
        with pytest.raises(UserError, match="columns and not rows, as pandas' to_json writes them"):
            list(read_rows(tmp_path / "a.json"))


def test_the_ending_of_a_name_is_behind_that_of_its_packing():
    assert [ending_of(name) for name in ("a.CSV.gz", "b.tar.zst", "c", ".jsonl.xz")] == [
        *(".csv", ".tar", "", "")
    ]
