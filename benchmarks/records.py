"""The measurements on disk: one JSON line each, of one device a file; the newest of each case."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# What says when and with what a record was made, not what was measured.
_ORIGIN = ("date", "commit", "torch", "triton", "megatron-core", "python", "driver", "device")


def read_records(path: Path) -> list[Record]:
    """Return the records of a file in their order; [] where there is none.

    Raises ValueError with file and line where a line is no record; a last line without its end is
    what a killed process leaves, and is left out.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    lines.pop()  # empty, or cut
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: no JSON record: {error}") from error
        if not isinstance(record, dict) or "benchmark" not in record:
            raise ValueError(f'{path}:{number}: a record has a field "benchmark"')
        records.append(record)
    return records


def newest(records: Iterable[Record], case: Callable[[Record], object]) -> list[Record]:
    """Return of each case the records of its newest run, in order.

    case(record) names what was measured, without the provider: all providers that took turns in one
    run stay together, since only they compare.
    """
    runs: dict[object, dict[str, list[Record]]] = {}
    for record in records:
        run = f"{record.get('date', '')} {record.get('commit', '')}"
        runs.setdefault(case(record), {}).setdefault(run, []).append(record)
    return [record for of_case in runs.values() for record in of_case[max(of_case)]]


def origin(record: Record) -> str:
    """Return what a record was measured with, in words."""
    return ", ".join(f"{name} {record[name]}" for name in _ORIGIN if record.get(name))
