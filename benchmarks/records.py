"""The measurements on disk: one JSON line each, of one device a file; the newest of each case."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_KERNEL_SIZES = (
    *("sequences", "length", "context", "block_size", "prompts", "completions", "rows"),
    *("tokens", "hidden", "heads", "kv_heads", "vocab"),
)


def append_line(path: Path, line: str) -> None:
    """Append a line, on a new one behind what a killed process left without its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        is_cut = file.read(1) not in (b"", b"\n")
        file.write(("\n" if is_cut else "").encode() + line.encode() + b"\n")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; [] where there is none. A last line without its end is what a
    killed process leaves, and is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines[:-1]


def read_records(path: Path, *, skips_broken: bool = False) -> list[Record]:
    """Return the records of a file in their order; [] where there is none.

    A line that is no record is left out with skips_broken, as a run that was killed and went on has
    one; else it is a ValueError with file and line.
    """
    records = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if skips_broken:
                continue
            raise ValueError(f"{path}:{number}: no JSON record: {error}") from error
        if not isinstance(record, dict) or "benchmark" not in record:
            if skips_broken:
                continue
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


def kernel_size(record: Record) -> dict[str, int]:
    """Return the size that a kernel was measured at, number by name."""
    return {name: record[name] for name in _KERNEL_SIZES if name in record}


def kernel_case(record: Record) -> tuple:
    """Return what names a case of the kernel suite: operation, mode and size."""
    return record["operation"], record["mode"], *kernel_size(record).items()
