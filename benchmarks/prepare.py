"""Data preparation on a made log: what it found against what was planted, minutes and memory.

    python -m benchmarks.prepare --records 100000 --out benchmarks/results/prepare.jsonl

The log is made, prepared by recipes/prepare.py in a process of its own with its default settings
but for --personal-splits all, so that every planted number can be found, and its dropped.jsonl is
held against what was planted, kind by kind.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.command_line import command, count, mistakes_in_one_line
from benchmarks.made_log import CAP, Planted, by_kind, made_log, write_log
from benchmarks.records import append_line

ROOT = Path(__file__).parents[1]


@mistakes_in_one_line()
def main() -> None:
    """Measure, and append the records to a file."""
    parser = command("prepare")
    parser.add_argument("--records", type=count, default=100_000)
    parser.add_argument("--out", type=Path, default=None, help="a file to append records to")
    options = parser.parse_args()
    planted = made_log(options.records)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_log(home / "log.jsonl", planted)
        cost = timed(home)
        rows = found_against_planted(planted, home / "data")
    found = {"benchmark": "prepare", "records": options.records, **cost, "kinds": rows}
    line = json.dumps({**found, **_origin()})
    print(line)
    if options.out:
        append_line(options.out, line)


def timed(home: Path) -> dict:
    """Prepare home/log.jsonl into home/data in a process of its own; return seconds and memory."""
    words = ["recipes/prepare.py", "--logs", home / "log.jsonl", "--out", home / "data"]
    words += ["--personal-splits", "all"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1e3),
        "log_mb": round((home / "log.jsonl").stat().st_size / 1e6),
    }


def found_against_planted(planted: list[Planted], data: Path) -> list[dict]:
    """Return a row a kind: how many were planted, how many are to be dropped, how many were, and
    how many for another reason."""
    reasons, rows = dropped_reasons(data), []
    for what, records in by_kind(planted):
        got = Counter(reasons.get(p.row["id"], "") for p in records)
        want = Counter(p.reason for p in records)
        if what == "over the cap":  # which of a user's go, a hash says; how many is planted
            users = Counter(p.row["user"] for p in records)
            want = Counter({"over_cap": sum(n - CAP for n in users.values()), "": CAP * len(users)})
        dropped = sum((got & want).values()) - (got & want)[""]
        rows.append(
            {
                "what": what,
                "planted": len(records),
                "to_drop": len(records) - want[""],
                "dropped": dropped,
                "wrongly": len(records) - got[""] - dropped,
            }
        )
    return rows


def dropped_reasons(data: Path) -> dict[str, str]:
    """Return {id: reason} of what a preparation dropped."""
    rows = map(json.loads, (data / "dropped.jsonl").read_text().splitlines())
    return {row["id"]: row["reason"] for row in rows}


def _origin() -> dict:
    names = (
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {
        "device": next(names, "").partition(":")[2].strip(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
