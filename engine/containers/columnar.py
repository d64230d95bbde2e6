"""Parquet and Arrow files, read through pyarrow some rows at a time, as plain values of Python."""

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.containers.lines import MAX_LINE_BYTES
from engine.containers.row import BadRecord, RowOrBad
from engine.errors import UserError, cut, named, quoted
from engine.files import MAX_SHOWN_PATH, open_file

if TYPE_CHECKING:  # half a second, which nobody needs who reads lines
    import pyarrow

_Value = TypeVar("_Value")

_ROWS = 64  # that are Python's values at a time; our choice: few, of which each may have megabytes
_BUFFER_BYTES = 1 << 20  # of a column that is read at a time
# As for packed text (packed.py): what is this much more than the file is no data of any use.
_MAX_EXPANSION = 100
_MIN_BOMB_BYTES = 128 << 20
_ROW_BYTES = 8  # that count for a row of nothing


def columnar_rows(
    path: Path, reached: Callable[[float], object], seen: Callable[[bytes], object], *, form: str
) -> Iterator[RowOrBad]:
    """Yield the rows of a file, without the cells that are null; options and errors as those of
    read_rows.

    form: "parquet", "arrow" or "arrow stream". A cell is null also where it is NaN. Moments are
    texts in ISO's form, lists and structs are lists and objects.
    """
    import pyarrow

    name = named(path, MAX_SHOWN_PATH)
    with open_file(path) as raw:
        num_bytes = raw.seek(0, 2)
        raw.seek(0)
        file = _Parquet(raw, name) if form == "parquet" else _Arrow(raw, form, name)
        columns = _columns(file.schema, name)
        number, unpacked = 0, 0
        for batch, share in file.batches():
            for start in range(0, batch.num_rows, _ROWS):
                part = batch.slice(start, _ROWS)
                unpacked += part.nbytes + _ROW_BYTES * part.num_rows
                if unpacked > max(_MIN_BOMB_BYTES, _MAX_EXPANSION * num_bytes):
                    raise UserError(
                        f"{name}: {num_bytes} bytes are {unpacked} unpacked at row {number + 1}; "
                        "write it as JSON lines, if it is meant so"
                    )
                for row in _rows(pyarrow.Table.from_batches([part]), columns):
                    number += 1
                    where = f"{name}: row {number}"
                    if isinstance(row, dict):
                        text = json.dumps(row, ensure_ascii=False, default=repr)
                        if len(text) > MAX_LINE_BYTES:
                            raise UserError(f"{where}: a row of over {MAX_LINE_BYTES} bytes")
                        seen(text.encode("utf-8", "surrogatepass") + b"\n")
                    yield where, row
            reached(share)


class _Parquet:
    """A parquet file, of which some rows are in memory."""

    def __init__(self, raw: Any, name: str) -> None:
        import pyarrow.parquet

        self._name = name
        self._file = _asked(
            lambda: pyarrow.parquet.ParquetFile(
                pyarrow.PythonFile(raw, mode="r"), buffer_size=_BUFFER_BYTES, pre_buffer=False
            ),
            f"{name}: damaged parquet, or cut short",
        )
        self.schema: pyarrow.Schema = _asked(
            lambda: self._file.schema_arrow, f"{name}: a schema that cannot be read"
        )

    def batches(self) -> Iterator[tuple["pyarrow.RecordBatch", float]]:
        """Yield (rows, share of the file that has been read with them)."""
        num_rows, all_rows = 0, max(1, self._file.metadata.num_rows)
        batches = self._file.iter_batches(batch_size=_ROWS, use_threads=False)
        while True:
            what = f"{self._name}: damaged parquet after row {num_rows}"
            batch = _asked(lambda: next(batches, None), what)
            if batch is None:
                return
            num_rows += batch.num_rows
            yield batch, num_rows / all_rows


class _Arrow:
    """An Arrow file or stream, of which one batch is in memory; the writer chose its rows."""

    def __init__(self, raw: Any, form: str, name: str) -> None:
        import pyarrow

        self._name, self._is_stream = name, form == "arrow stream"
        file = pyarrow.PythonFile(raw, mode="r")
        opened = pyarrow.ipc.open_stream if self._is_stream else pyarrow.ipc.open_file
        self._file = _asked(lambda: opened(file), f"{name}: damaged Arrow data, or cut short")
        self.schema: pyarrow.Schema = self._file.schema

    def batches(self) -> Iterator[tuple["pyarrow.RecordBatch", float]]:
        """As those of parquet; each is checked, since a file may say what would crash us."""
        number = num_rows = 0
        all_batches = 0 if self._is_stream else self._file.num_record_batches
        while self._is_stream or number < all_batches:
            what = f"{self._name}: damaged Arrow data after row {num_rows}, or cut short"
            batch = _asked(lambda: self._next(number), what)  # noqa: B023 - called at once
            if batch is None:
                return
            _asked(lambda: batch.validate(full=True), what)  # noqa: B023
            number += 1
            num_rows += batch.num_rows
            yield batch, number / max(number, all_batches)

    def _next(self, number: int) -> "pyarrow.RecordBatch | None":
        if not self._is_stream:
            return self._file.get_batch(number)
        try:
            return self._file.read_next_batch()
        except StopIteration:
            return None


def _asked(ask: Callable[[], _Value], what: str) -> _Value:
    """Return what a call of pyarrow's does; UserError that begins as told for its errors."""
    import pyarrow

    try:
        return ask()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
        lines = str(error).splitlines() or [""]
        raise UserError(f"{what}: {cut(lines[0], MAX_SHOWN_PATH)}") from None
    except MemoryError:
        raise UserError(f"{what}: it takes more memory than there is") from None


_Plain = Callable[[Any], Any]


def _columns(schema: "pyarrow.Schema", name: str) -> dict[str, tuple["pyarrow.DataType", _Plain]]:
    """Return by column which type its values are read as, and what makes them plain."""
    what = f"{name}: a schema that cannot be read"
    columns = _asked(lambda: [(c.name, _readable(c.type), _plain_of(c.type)) for c in schema], what)
    found = {column: (kind, plain) for column, kind, plain in columns}
    if len(found) < len(columns):
        (most, _), *_ = Counter(column for column, *_ in columns).most_common(1)
        raise UserError(f"{name}: two columns are called {quoted(most)}")
    return found


def _rows(table: "pyarrow.Table", columns: Any) -> list[dict[str, Any] | BadRecord]:
    """Return some rows; what is wrong with one is said in its place."""
    try:
        values = [
            [make(value) for value in _cast(table.column(index), kind).to_pylist()]
            for index, (kind, make) in enumerate(columns.values())
        ]
    except Exception as error:  # pyarrow's, Python's for dates and bytes that are none
        if table.num_rows > 1:
            parts = (table.slice(index, 1) for index in range(table.num_rows))
            return [row for part in parts for row in _rows(part, columns)]
        return [BadRecord(f"a value that cannot be read: {cut(str(error))}")]
    names = list(columns)
    return [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in (zip(*values, strict=True) if values else [()] * table.num_rows)
    ]


def _cast(column: "pyarrow.ChunkedArray", kind: "pyarrow.DataType") -> "pyarrow.ChunkedArray":
    return column if column.type == kind else column.cast(kind, safe=False)


def _readable(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """Return the type that values are cast to before they are Python's: that knows microseconds,
    and time zones by name only where the system has them."""
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(kind):
        return pyarrow.timestamp("us", tz="UTC" if kind.tz else None)
    if types.is_time64(kind):
        return pyarrow.time64("us")
    if types.is_duration(kind):
        return pyarrow.duration("us")
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_readable(field.type)) for field in kind])
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_readable(kind.value_type)))
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_readable(kind.value_type)))
    return kind


def _plain_of(kind: "pyarrow.DataType") -> _Plain:
    """Return what turns the values of a type, as pyarrow gives them, into JSON's."""
    from pyarrow import types

    if isinstance(kind, _extension()):
        return _plain_of(kind.storage_type) if kind.extension_name != "arrow.uuid" else _scalar
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain_of(kind.value_type)
    if types.is_struct(kind):
        return _struct({field.name: _plain_of(field.type) for field in kind})
    if types.is_map(kind):
        return _map(_plain_of(kind.item_type))
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # every kind of list
        return _list(_plain_of(kind.value_type))
    return _scalar


def _extension() -> Any:
    import pyarrow

    return pyarrow.BaseExtensionType


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "__float__"):  # a decimal, and numpy's half precision
        number = float(value)
        return number if number == number else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):  # texts of writers that do not say so; pictures stay bytes
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return str(value)


def _struct(fields: dict[str, _Plain]) -> _Plain:
    def plain(value: Any) -> Any:
        if value is None:
            return None
        made = {key: fields[key](each) for key, each in value.items()}
        return {key: each for key, each in made.items() if each is not None}

    return plain


def _map(item: _Plain) -> _Plain:
    def plain(value: Any) -> Any:
        if value is None:
            return None
        pairs = value.items() if isinstance(value, dict) else value
        made = {str(key): item(each) for key, each in pairs}
        return {key: each for key, each in made.items() if each is not None}

    return plain


def _list(item: _Plain) -> _Plain:
    def plain(value: Any) -> Any:
        return None if value is None else [item(each) for each in value]

    return plain
