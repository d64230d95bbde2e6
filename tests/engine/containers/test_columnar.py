import datetime
import decimal
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.containers import columnar
from engine.containers.rows import read_rows
from engine.errors import UserError
from tests.engine.containers.test_rows import read


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def arrow(path: Path, table: pa.Table, *, is_stream: bool = False, compression: Any = None) -> Path:
    opened = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def test_values_are_pythons_own(tmp_path: Path):
    moment = datetime.datetime(2024, 5, 1, 12, 30)
    table = pa.table(
        {
            "text": pa.array(["é", None]),
            "category": pa.array(["x", "x"]).dictionary_encode(),
            "score": pa.array([math.nan, 0.5]),
            "half": pa.array([np.float16(1.5), None], pa.float16()),
            "rank": pa.array([2, None]),
            "flag": pa.array([True, False]),
            "at": pa.array([moment, None], pa.timestamp("ns", tz="America/New_York")),
            "day": pa.array([moment.date(), None]),
            "took": pa.array([1_500_000_000, None], pa.duration("ns")),
            "price": pa.array([decimal.Decimal("1.25"), None]),
            "bytes": pa.array([b"text", b"\xff\xd8"]),
            "turns": pa.array(
                [[{"role": "user", "name": None, "n": math.nan}, None], []],
                pa.list_(
                    pa.struct([("role", pa.string()), ("name", pa.string()), ("n", pa.float32())])
                ),
            ),
            "meta": pa.array([{"a": None}, None], pa.struct([("a", pa.int64())])),
            "map": pa.array([[("k", 1), ("l", None)], None], pa.map_(pa.string(), pa.int64())),
            "nothing": pa.nulls(2),
        }
    )
    expected = [
        {
            **{"text": "é", "category": "x", "half": 1.5, "rank": 2, "flag": True},
            **{"at": "2024-05-01T12:30:00+00:00", "day": "2024-05-01", "took": 1.5},
            **{"price": 1.25, "bytes": "text", "turns": [{"role": "user"}, None]},
            **{"meta": {}, "map": {"k": 1}},
        },
        {"category": "x", "score": 0.5, "flag": False, "bytes": b"\xff\xd8", "turns": []},
    ]
    for path in (
        arrow(tmp_path / "a.arrow", table),
        arrow(tmp_path / "b.arrow", table, is_stream=True),
        parquet(tmp_path / "a.parquet", table),
    ):
        rows = read(path)[1]
        assert rows[1] == expected[1]
        assert rows[0] == expected[0]
        assert {type(value) for value in rows[0].values()} <= {str, int, float, bool, list, dict}


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_rows_are_numbered_over_row_groups(tmp_path: Path, compression: str):
    rows = [{"text": f"text {number}"} for number in range(1000)]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, compression=compression) as writer:
        for start, end in ((0, 300), (300, 300), (300, 1000)):  # the second group is empty
            writer.write_table(table.slice(start, end - start))
    places, found = read(path)
    assert found == rows
    assert (places[0], places[-1]) == (": row 1", ": row 1000")


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_arrow_is_read_batch_by_batch(tmp_path: Path, compression: str | None):
    rows = [{"text": f"text {number}"} for number in range(1000)]
    for is_stream in (False, True):
        path = tmp_path / f"{is_stream}.arrow"
        arrow(path, pa.Table.from_pylist(rows), is_stream=is_stream, compression=compression)
        assert read(path)[1] == rows


def test_a_table_without_rows_or_columns_has_none(tmp_path: Path):
    empty = pa.table({"text": pa.array([], pa.string())})
    assert read(parquet(tmp_path / "a.parquet", empty)) == ([], [])
    assert read(arrow(tmp_path / "a.arrow", empty)) == ([], [])
    assert read(parquet(tmp_path / "b.parquet", pa.table({"a": pa.nulls(2)})))[1] == [{}, {}]


def test_two_columns_of_a_name_are_refused(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"])
    with pytest.raises(UserError, match=r"a\.arrow: two columns are called 'text'"):
        list(read_rows(arrow(tmp_path / "a.arrow", table)))


def test_a_value_that_cannot_be_read_is_a_bad_row(tmp_path: Path):
    table = pa.table({"day": pa.array([1, 2**31 - 1, 3], pa.int32()).cast(pa.date32())})
    _, rows = read(parquet(tmp_path / "a.parquet", table))
    assert rows[0] == {"day": "1970-01-02"}
    assert rows[1].startswith("a value that cannot be read: ")
    assert rows[2] == {"day": "1970-01-04"}
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    path = parquet(tmp_path / "b.parquet", pa.table({"text": bad}))
    assert "utf-8" in read(path)[1][0]


def test_a_huge_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columnar, "MAX_LINE_BYTES", 10_000)
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["a", "b" * 20_000]}))
    with pytest.raises(UserError, match=r"a\.parquet: row 2: a row of over 10000 bytes"):
        list(read_rows(path))


@pytest.mark.parametrize("text", ["x" * 100_000, None])
def test_what_expands_as_no_data_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
):
    monkeypatch.setattr(columnar, "_MIN_BOMB_BYTES", 1 << 20)
    table = pa.table({"text": pa.array([text] * 200_000 if text is None else [text] * 5000)})
    path = parquet(tmp_path / "a.parquet", table, compression="zstd")
    with pytest.raises(UserError, match=r"a\.parquet: \d+ bytes are \d+ unpacked at row \d+"):
        list(read_rows(path))


def test_a_damaged_file_is_named_and_never_crashes(tmp_path: Path):
    rows = [{"text": f"text {number}", "list": [number, None]} for number in range(300)]
    table = pa.Table.from_pylist(rows)
    drawn = random.Random(0)
    written = [
        parquet(tmp_path / "a.parquet", table, compression="zstd"),
        arrow(tmp_path / "a.arrow", table),
        arrow(tmp_path / "b.arrow", table, is_stream=True, compression="zstd"),
    ]
    for path in written:
        whole = path.read_bytes()
        num_refused = 0
        for number in range(150):
            content = bytearray(whole)
            if number % 3 == 0:
                content = content[: drawn.randrange(9, len(whole))]
            else:
                for _ in range(number % 3):
                    content[drawn.randrange(8, len(whole))] = drawn.randrange(256)
            path.write_bytes(content)
            try:
                found = read(path)[1]
            except UserError as error:
                num_refused += 1
                assert str(path) in str(error) and len(str(error)) < 1000
                assert "\n" not in str(error)
            else:  # as no checksum says otherwise, or the stream ends between two batches
                assert len(found) <= len(rows)
        assert num_refused > 40


def test_a_cut_file_is_said_to_be_cut(tmp_path: Path):
    table = pa.table({"text": ["a"] * 500})
    for path in (parquet(tmp_path / "a.parquet", table), arrow(tmp_path / "a.arrow", table)):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=rf"{path.name}: damaged \w+.*, or cut short: "):
            list(read_rows(path))


def test_pyarrow_is_not_imported_for_lines():
    code = "import engine.data.records, sys; print(*(m for m in sys.modules if 'pyarrow' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
