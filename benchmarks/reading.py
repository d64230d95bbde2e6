"""Times how long it takes to read data in each container into records.

    python -m benchmarks.reading --num-records 200000

The same made records, of 180 words each, are written once in every container, and read in turns by
the reader that all stages have, in one process on one core. Seconds are the CPU's.
"""

import argparse
import bz2
import csv
import gzip
import json
import lzma
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command_line import command, count, mistakes_in_one_line
from engine.data.demonstrations import read_demonstrations
from engine.printable import say

_WORDS = ("the", "mill", "is", "a", "cheap", "pub", "near", "river", "and", "serves", "food")
_TIMES = 3  # of which the fastest counts


@mistakes_in_one_line()
def main() -> None:
    """Print records and megabytes a second of each container."""
    parser = command("reading")
    parser.add_argument("--num-records", type=count, default=200_000)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: removed")
    arguments: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in write_containers(folder, made_records(arguments.num_records)):
            seconds = min(seconds_to_read(path) for _ in range(_TIMES))
            megabytes = path.stat().st_size / 1e6
            say(
                f"{path.name:<12} {megabytes:6.1f} MB {seconds:6.2f} s "
                f"{arguments.num_records / seconds:8.0f} records/s {megabytes / seconds:6.1f} MB/s"
            )


def made_records(number: int) -> list[dict[str, str]]:
    """Return demonstrations of random words."""
    drawn = random.Random(0)
    return [
        {
            "prompt": f"{index} " + " ".join(drawn.choices(_WORDS, k=60)),
            "response": " ".join(drawn.choices(_WORDS, k=120)),
        }
        for index in range(number)
    ]


def write_containers(folder: Path, records: list[dict[str, str]]) -> list[Path]:
    """Write the records in every container; return the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    packings: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
        ".xz": lambda content: lzma.compress(content, preset=1),
        ".bz2": bz2.compress,
    }
    for ending, pack in packings.items():
        (folder / f"a.jsonl{ending}").write_bytes(pack(lines))
    (folder / "list.json").write_text(json.dumps(records))
    (folder / "indented.json").write_text(json.dumps(records, indent=2))
    with (folder / "a.csv").open("w", newline="") as stream:
        writer: Any = csv.DictWriter(stream, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(records)
    table = pa.Table.from_pylist(records)
    pq.write_table(table, folder / "a.parquet")
    sink = pa.OSFile(str(folder / "a.arrow"), "wb")
    with sink, pa.ipc.new_stream(sink, table.schema) as arrow:
        arrow.write_table(table, max_chunksize=1000)
    return sorted(folder.glob("*.*"))


def seconds_to_read(path: Path) -> float:
    """Return the CPU seconds that it takes to have all records of a file."""
    start = time.process_time()
    read_demonstrations(path)
    return time.process_time() - start


if __name__ == "__main__":
    main()
