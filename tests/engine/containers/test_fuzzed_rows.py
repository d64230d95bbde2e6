"""Generated rows in every container, and generated files of no sense."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.containers import json_values
from engine.containers.row import BadRecord
from engine.containers.rows import read_rows
from engine.errors import UserError
from tests.engine.containers.test_rows import COLUMNAR, TEXTS
from tests.fuzzing import fuzzed

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).map(lambda name: f"a{name}")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4), min_size=2, max_size=4)


def read(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    rows = [row for _, row in read_rows(path)]
    assert not any(isinstance(row, BadRecord) for row in rows)
    return rows


@pytest.mark.fuzz
@fuzzed
@given(rows=ROWS, indent=st.sampled_from([None, 0, 3]), part_bytes=st.integers(1, 60))
def test_json_of_any_form_gives_the_rows(
    tmp_path: Path, rows: list[Any], indent: int | None, part_bytes: int
):
    path = tmp_path / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PART_BYTES", part_bytes)
        assert read(path, json.dumps(rows, indent=indent).encode()) == rows
        assert read(path, json.dumps({"n": 1, "data": rows}, indent=indent).encode()) == rows
        texts = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
        assert read(path, "\r\n".join(texts).encode()) == rows


@pytest.mark.fuzz
@fuzzed
@given(
    rows=st.lists(st.lists(TEXT, min_size=2, max_size=2).filter(any), min_size=1, max_size=5),
    delimiter=st.sampled_from(",\t"),
)
def test_cells_come_back(tmp_path: Path, rows: list[list[str]], delimiter: str):
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt of mine", "b"], *rows])
    wanted = [
        {name: cell for name, cell in zip(("prompt of mine", "b"), row, strict=True) if cell}
        for row in rows
    ]
    assert read(tmp_path / "a.csv", sink.getvalue().encode()) == wanted


@pytest.mark.fuzz
@pytest.mark.parametrize("form", [*TEXTS, *COLUMNAR])
@fuzzed
@given(
    splices=st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 6), st.binary(max_size=6)), max_size=4
    ),
    cut=st.none() | st.integers(0, 4000),
)
def test_a_damaged_file_has_rows_or_an_error(
    form: str, tmp_path: Path, splices: list[tuple[int, int, bytes]], cut: int | None
):
    ending, content = {**TEXTS, **COLUMNAR}[form]
    for start, num_bytes, new in splices:
        start %= len(content) + 1
        content = content[:start] + new + content[start + num_bytes :]
    path = tmp_path / f"a{ending}"
    path.write_bytes(content[:cut])
    try:
        for where, row in read_rows(path):
            assert where.startswith(str(path))
            assert isinstance(row, dict) or len(str(row)) < 1000
    except UserError as error:
        assert str(error).startswith(str(path))
        assert len(str(error)) < 1000
