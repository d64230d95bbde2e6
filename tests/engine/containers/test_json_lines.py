from pathlib import Path

import pytest

from engine.containers.json_lines import only_object, parse_object, without_nulls
from engine.containers.row import BadRecord, json_type
from tests.engine.containers.test_rows import read


def test_lines_are_named_by_their_numbers(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "b": null}\r\n\n  \n{"a": \n[1]\n{"a": "\xe9"}\n')
    places, rows = read(path)
    assert places == [":1", ":4", ":5", ":6"]
    assert rows[0] == {"a": 1}
    assert rows[1] == "not one JSON object on one line: Expecting value at column 6"
    assert rows[2] == "must be one JSON object, not a list"
    assert rows[3].startswith("not UTF-8: byte 8 of the line (Latin-1 or Windows")


def test_null_fields_are_absent_at_any_depth():
    row = parse_object(b'{"a": null, "b": [null, {"c": null, "d": "null"}], "e": {"f": null}}')
    assert row == {"b": [None, {"d": "null"}], "e": {}}
    assert without_nulls([{"a": None}, None]) == [{}, None]


def test_only_an_object_is_a_row():
    assert only_object({"a": 1}) == {"a": 1}
    with pytest.raises(BadRecord, match="must be one JSON object, not null"):
        only_object(None)
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(BadRecord, match="not JSON that can be read"):
        only_object({"a": deep})


def test_types_have_jsons_words():
    assert [json_type(v) for v in ("a", True, 1, 0.5, [], {}, None, b"a")] == [
        *("a string", "a boolean", "a number", "a number", "a list", "an object", "null"),
        "binary data",
    ]


def test_a_dict_of_pythons_is_told(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("{'a': 1}\n")
    assert read(path)[1][0].endswith("(Python's way to write it? write it by json.dumps)")
