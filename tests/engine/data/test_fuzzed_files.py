"""Generated data files: bytes, gzip, and JSON that is nearly a record; see readers.py."""

import copy
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.files import open_file, read_object
from tests.engine.data.readers import READERS, check
from tests.engine.data.test_hostile_files import RAW, places
from tests.fuzzing import fuzzed

KEYS = ["prompt", "response", "messages", "completions", "ranks", "chosen", "rejected", "text"]
KEYS += ["role", "content"]
ROLES = ["user", "assistant", "system", "tool"]
TEXT = st.text(st.characters(), max_size=20)  # halves of surrogate pairs among them
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(ROLES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=4),
    ),
    max_leaves=8,
)
EDITS = st.lists(st.tuples(st.integers(0, 30), st.none() | st.tuples(VALUES)), max_size=3)
SPLICES = st.lists(
    st.tuples(
        st.integers(0, 300),
        st.integers(0, 4),
        st.binary(max_size=4) | st.sampled_from([raw.encode() for raw in RAW]),
    ),
    max_size=2,
)


@st.composite
def near_lines(draw: st.DrawFn, records: list[Any]) -> bytes:
    """Draw a file of one to three lines, each a good record with some of it changed."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        record = draw(st.sampled_from(records))
        for place, change in draw(EDITS):
            record = edited(record, place, change)
        text = json.dumps(record, ensure_ascii=draw(st.booleans()))
        lines.append(text.encode("utf-8", "surrogatepass"))
    return spliced(draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines), draw(SPLICES))


def edited(record: Any, place: int, change: tuple[Any] | None) -> Any:
    """Return a record in which one field or item is another, or is gone."""
    paths = list(places(record))
    if not paths:
        return record
    path = paths[place % len(paths)]
    record = copy.deepcopy(record)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if change is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = change[0]
    return record


def spliced(content: bytes, splices: list[tuple[int, int, bytes]]) -> bytes:
    """Return bytes of which some are replaced."""
    for start, num_bytes, new in splices:
        content = content[:start] + new + content[start + num_bytes :]
    return content


def checked(name: str, folder: Path, content: bytes) -> None:
    check(name, folder, content)
    shutil.rmtree(folder / "cache", ignore_errors=True)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
@fuzzed
@given(content=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_bytes_are_read_whole_or_refused(name: str, tmp_path: Path, content: bytes):
    checked(name, tmp_path, content)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
@fuzzed
@given(data=st.data())
def test_what_is_nearly_a_record_is_read_whole_or_refused(name: str, tmp_path: Path, data: Any):
    reader = READERS[name]
    if reader.suffix == ".txt":
        content = spliced(reader.content() * data.draw(st.integers(1, 3)), data.draw(SPLICES))
    else:
        content = data.draw(near_lines(reader.records))
    checked(name, tmp_path, content)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
@fuzzed
@given(parts=st.lists(st.binary(max_size=99) | st.none(), max_size=4), splices=SPLICES)
def test_damaged_gzip_is_read_whole_or_refused(
    name: str, tmp_path: Path, parts: list[bytes | None], splices: list[tuple[int, int, bytes]]
):
    content = READERS[name].content()
    members = [gzip.compress(content if part is None else part, 1) for part in parts]
    checked(name, tmp_path, spliced(b"".join(members) or gzip.compress(content), splices))


@pytest.mark.fuzz
@fuzzed
@given(name=TEXT | st.lists(TEXT, max_size=4).map("/".join) | st.sampled_from(["a" * 300, "."]))
def test_a_path_is_opened_or_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_bytes(b"{}")
    path = tmp_path / "folder" / name.replace("..", "").lstrip("/")
    for read in (lambda: open_file(path).close(), lambda: read_object(path)):
        with pytest.raises(UserError) as error:  # nothing is there
            read()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 2000
