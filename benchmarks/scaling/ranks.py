"""What is asked of several ranks: how the bytes and messages of one grow with the batch, and with
the ranks. These share one batch (strong scaling) or have each as much as before (weak).

Nothing is timed: the ranks share the cores of one machine. Below, n is the number of ranks, T the
tokens of the whole batch in m micro-batches. P is the number of parameters, in L layers of width h
with a vocabulary of V, 4 bytes a number:

    dp   2 x 4 P (n-1)/n                     gradients to their owners, weights back
    tp   (4 L + 2) 4 T h x 2 (n-1)/n         all-reduces: two a layer and pass, embedding, head;
         + 16 (n-1) a predicted token        and what the head's shares say of each row
    pp   (2 (n-1) 4 T h + 2 x 4 V h) / n     hidden states there, gradients back; tied embedding

and in a rollout, of D drawn tokens and T fed ones:

    dp   (n-1)/n of the pickled responses
    tp   (2 L + 1) 4 T h x 2 (n-1)/n + 16 (n-1) D
    pp   4 T h (n-1)/n + 8 D (n-1)/n         hidden states; tokens and log-probs back
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scaling.curve import COUNT_TOLERANCE, Curve
from benchmarks.scaling.rank import ITEMSIZE, LENGTH, PROMPT, RESPONSE, SIZE, layouts

BYTES, CALLS = "bytes sent a rank", "messages a rank"
JOBS = ("training step", "rollout")
SEQUENCES = (8, 16, 32, 64)
SHARED = 32
"""Sequences of the batch that all ranks share."""
OWN = 8
"""Sequences a rank where each has as much as before."""
_PICKLED_RESPONSE = 81 + 12 * RESPONSE  # bytes: a header, int64 tokens, fp32 log-probs
_PICKLED_LIST = 241  # bytes: names of classes, once a rank

Row = dict[str, Any]


def rows_of(num_ranks: int) -> list[Row]:
    """Return what ranks.py's processes counted; RuntimeError with what they said where they
    failed."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), "-m", "benchmarks.scaling.rank", str(file)]
        command += ["--sequences", *map(str, SEQUENCES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not file.exists():
            raise RuntimeError(f"{num_ranks} ranks failed:\n{done.stderr[-4000:]}")
        return [json.loads(line) for line in file.read_text().splitlines()]


def curves(degrees: tuple[int, ...]) -> Iterator[Curve]:
    """Yield the curves of worlds of so many ranks each. The largest one's are against the batch;
    where there are several, all of them are against the ranks too."""
    rows = {degree: rows_of(degree) for degree in degrees}
    largest = max(degrees)
    for kind in layouts(largest):
        for job in JOBS:
            for unit in (BYTES, CALLS):
                points = [(largest, n) for n in SEQUENCES]
                yield _curve(rows, (kind, job, unit), points, SEQUENCES)
    if len(degrees) < 2:
        return
    for kind in layouts(largest):
        for job in JOBS:
            for what, sequences in (("strong", lambda n: SHARED), ("weak", lambda n: OWN * n)):
                points = [(n, sequences(n)) for n in degrees]
                yield _curve(rows, (kind, job, BYTES), points, degrees, f", {what} scaling")


def num_alone(rows: list[Row]) -> dict[str, float]:
    """Return the collectives in groups of one rank, which are of no use, by layout and job."""
    return {f"{row['layout']} {row['ranks']}, {row['job']}": row["alone"] for row in rows}


def bytes_of(kind: str, job: str, num_ranks: int, num_sequences: int) -> float:
    """Return the bytes that a rank has to send, by the formulas above."""
    n, hidden = num_ranks, SIZE.hidden_size * ITEMSIZE
    others = (n - 1) / n
    if job == "training step":
        tokens, targets = num_sequences * LENGTH, num_sequences * (LENGTH - 1)
        if kind == "dp":
            return 2 * SIZE.num_parameters * ITEMSIZE * others
        if kind == "tp":
            sums = (4 * SIZE.num_layers + 2) * tokens * hidden * 2 * others
            return sums + 16 * (n - 1) * targets
        return (2 * (n - 1) * tokens + 2 * SIZE.padded_vocab_size) * hidden / n
    tokens, draws = num_sequences * (PROMPT + RESPONSE - 1), num_sequences * RESPONSE
    if kind == "dp":
        return others * (num_sequences * _PICKLED_RESPONSE + n * _PICKLED_LIST)
    if kind == "tp":
        sums = (2 * SIZE.num_layers + 1) * tokens * hidden * 2 * others
        return sums + 16 * (n - 1) * draws
    return tokens * hidden * others + 8 * draws * others


def _calls_of(kind: str, job: str, num_sequences: int) -> float:
    """How the messages of a rank grow: with micro-batches or decoding steps, none with dp."""
    return 1.0 if kind == "dp" else float(num_sequences)


def _curve(
    rows: dict[int, list[Row]],
    of: tuple[str, str, str],
    points: list[tuple[int, int]],
    sizes: tuple[int, ...],
    scaling: str = "",
) -> Curve:
    """points: (ranks, sequences) of each size."""
    kind, job, unit = of
    found = {
        (row["ranks"], row["sequences"]): row
        for degree in rows
        for row in rows[degree]
        if (row["layout"], row["job"]) == (kind, job)
    }
    if unit == BYTES:
        expected = [bytes_of(kind, job, *point) for point in points]
        costs = [float(found[point]["bytes"]) for point in points]
    else:
        expected = [_calls_of(kind, job, num_sequences) for _, num_sequences in points]
        costs = [float(found[point]["calls"]) for point in points]
    name = kind if scaling else f"{kind} {points[0][0]}"
    return Curve(
        what=f"{job}, {name}{scaling}",
        variable="ranks" if scaling else "sequences",
        unit=unit,
        sizes=tuple(sizes),
        costs=tuple(costs),
        formula="as ranks.py says" if unit == BYTES else ("1" if kind == "dp" else "n"),
        expected_costs=tuple(expected),
        tolerance=COUNT_TOLERANCE,
        # What pickle writes around numbers is another with every Python.
        is_absolute=unit == BYTES and (kind, job) != ("dp", "rollout"),
    )
