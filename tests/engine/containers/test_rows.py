"""Every container in its exact form, read as the same rows."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from engine.containers.row import BadRecord
from engine.containers.rows import read_rows
from engine.shapes.held_lists import with_lists

ROWS: list[dict[str, Any]] = [
    {"prompt": "Where is\nthe mill?", "response": 'By "the" river, é \U0001f600'},
    {"prompt": "[1, 2]", "messages": [{"role": "user", "content": "a"}]},
]


def zstd(content: bytes) -> bytes:
    sink = io.BytesIO()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
        stream.flush()
        return bytes(pa.compress(content, "zstd", asbytes=True))


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "zstd": zstd,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def csv_of(delimiter: str) -> bytes:
    cells = [["prompt", "response", "messages"]]
    for row in ROWS:
        messages = json.dumps(row["messages"]) if "messages" in row else ""
        cells.append([row["prompt"], row.get("response", ""), messages])
    lines = [delimiter.join('"' + c.replace('"', '""') + '"' for c in row) for row in cells]
    return "\r\n".join(lines).encode()


def columnar(write: Callable[[pa.Table, Any], object]) -> bytes:
    sink = io.BytesIO()
    write(
        pa.Table.from_pylist(
            [{"prompt": None, "response": None, "messages": None} | r for r in ROWS]
        ),
        sink,
    )
    return sink.getvalue()


def ipc(open_writer: Callable[..., Any], table: pa.Table, sink: Any) -> None:
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)


TEXTS: dict[str, tuple[str, bytes]] = {
    "JSON lines": (".jsonl", "\n".join(json.dumps(row) for row in ROWS).encode()),
    "JSON lines of Windows": (
        ".json",
        b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row) for row in ROWS).encode(),
    ),
    "a list on a line": (".json", json.dumps(ROWS).encode()),
    "a list over lines": (".json", json.dumps(ROWS, indent=2).encode()),
    "an object with data": (".json", json.dumps({"version": "1", "data": ROWS}).encode()),
    "an object over lines": (".json", json.dumps({"train": ROWS, "n": 2}, indent=1).encode()),
    "objects over lines": (".json", "\n".join(json.dumps(row, indent=4) for row in ROWS).encode()),
    "CSV": (".csv", b"\xef\xbb\xbf" + csv_of(",")),
    "TSV": (".tsv", csv_of("\t")),
    "TSV by another name": (".csv", csv_of("\t")),
    "CSV by another name": (".jsonl", csv_of(",")),
    "CSV with semicolons": (".csv", csv_of(";")),
    "CSV of old Macs": (".csv", csv_of(",").replace(b"\r\n", b"\r")),
}
COLUMNAR: dict[str, tuple[str, bytes]] = {
    "parquet": (".parquet", columnar(pa.parquet.write_table)),
    "Arrow file": (".arrow", columnar(lambda t, sink: ipc(pa.ipc.new_file, t, sink))),
    "Arrow stream": (".arrow", columnar(lambda t, sink: ipc(pa.ipc.new_stream, t, sink))),
    "feather": (".feather", columnar(lambda t, sink: pa.feather.write_feather(t, sink))),
}


def read(path: Path) -> tuple[list[str], list[Any]]:
    """Return where the rows of a file stand, and the rows, or what is wrong with them, in words."""
    found = list(read_rows(path))
    places = [where.removeprefix(str(path)) for where, _ in found]
    return places, [str(row) if isinstance(row, BadRecord) else row for _, row in found]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", TEXTS)
def test_every_form_of_text_is_read_plain_and_packed(form: str, packing: str, tmp_path: Path):
    ending, content = TEXTS[form]
    path = tmp_path / f"data{ending}"  # whatever the name says of packing
    path.write_bytes(PACKINGS[packing](content))
    assert [with_lists(row) for row in read(path)[1]] == ROWS


@pytest.mark.parametrize("form", COLUMNAR)
def test_every_columnar_form_is_read(form: str, tmp_path: Path):
    ending, content = COLUMNAR[form]
    for name in (f"data{ending}", "data.jsonl", "data"):  # the content says what it is
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ([": row 1", ": row 2"], ROWS)


def test_rows_tell_what_was_seen_and_how_far(tmp_path: Path):
    for number, (ending, content) in enumerate([*TEXTS.values(), *COLUMNAR.values()]):
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(content)
        shares: list[float] = []
        seen: list[bytes] = []
        list(read_rows(path, shares.append, seen.append))
        assert shares and shares[-1] == 1.0
        assert b"river" in b"".join(seen)


@pytest.mark.parametrize(
    "name",
    [
        *("llmbar/natural.json", "pandalm/testset-v1.json", "truthfulqa/mc_task.json"),
        *("truthfulqa/TruthfulQA.csv", "winogender/all_sentences.tsv"),
        *("winogender/templates.tsv", "crows_pairs/crows_pairs_anonymized.csv"),
    ],
)
def test_real_files_are_read_without_a_bad_row(data_pack: Path, name: str):
    rows = [row for _, row in read_rows(data_pack / "eval" / name)]
    assert len(rows) > 50
    assert all(isinstance(row, dict) and len(row) > 1 for row in rows)
