"""The measurements of a case as a table for the terminal, those of an operation as a plot."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich import box
from rich.table import Table

from benchmarks.kernel_suite.operation import Mode, Size

Record = Mapping[str, Any]
OURS = "trident"


def table(records: Sequence[Record], operation: str, size: Size, mode: Mode) -> Table:
    """One row a provider that was timed, the fastest first; below, why the others were not."""
    timed = sorted(_with_status(records, "timed"), key=lambda record: record["median_ms"])
    ours = next((r["median_ms"] for r in timed if r["provider"] == OURS), None)
    columns = {
        "provider": [_label(r) for r in timed],
        "ms": [f"{r['median_ms']:.4g}" for r in timed],
        "p20 - p80": [f"{r['p20_ms']:.3g} - {r['p80_ms']:.3g}" for r in timed],
        "x ours": [f"{r['median_ms'] / ours:.2f}" if ours else "" for r in timed],
        "GB/s": [_number(r["gb_per_s"]) for r in timed],
        "TFLOP/s": [_number(r["tflops"]) for r in timed],
        "peak MiB": [f"{r['peak_bytes'] / 2**20:.1f}" for r in timed],
        "launches": [str(r.get("launches", "")) for r in timed],
        "wall ms": [_number(r.get("wall_ms")) for r in timed],
        "error against fp64": [_errors(r) for r in timed],
    }
    shown = Table(
        title=f"{operation}: {_words(size)}, {mode}",
        title_justify="left",
        title_style="bold",
        caption=_left_out(records),
        caption_justify="left",
        box=box.SIMPLE,
    )
    used = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in used:
        is_text = heading in ("provider", "error against fp64")
        shown.add_column(heading, justify="left" if is_text else "right")
    for record, *cells in zip(timed, *used.values(), strict=True):
        shown.add_row(*cells, style=_style(record))
    return shown


def _with_status(records: Sequence[Record], *status: str) -> list[Record]:
    return [record for record in records if record["status"] in status]


def _label(record: Record) -> str:
    if record["is_bound"]:
        return f"{record['provider']} (bound)"
    if record["provider"].startswith(OURS) and record["trident_path"] == "reference":
        return f"{record['provider']} (reference path)"
    return record["provider"]


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value else ""


def _errors(record: Record) -> str:
    return ", ".join(f"{name} {error:.0e}" for name, error in record.get("errors", {}).items())


def _style(record: Record) -> str:
    if record["is_bound"]:
        return "italic"
    return "bold" if record["provider"] == OURS else ""


def _words(size: Size) -> str:
    return ", ".join(f"{name} {value}" for name, value in size.items())


def _left_out(records: Sequence[Record]) -> str:
    """A line for each provider that is wrong or failed, one for each reason to skip some."""
    lines = [
        f"{record['provider']} {record['status']}: {record.get('reason') or _errors(record)}"
        for record in _with_status(records, "wrong", "failed")
    ]
    skipped = sorted(_with_status(records, "skipped"), key=lambda record: record["reason"])
    for reason, group in groupby(skipped, key=lambda record: record["reason"]):
        names = ", ".join(record["provider"] for record in group)
        lines.append(f"skipped, {reason}: {names}")
    return "\n".join(lines)


def plot(records: Sequence[Record], sizes: Sequence[Size], title: str, path: Path) -> Path:
    """Draw milliseconds by size, one panel a mode, one line a provider; return the file."""
    mpl.use("agg")
    from matplotlib import pyplot

    timed = _with_status(records, "timed")
    modes = list(dict.fromkeys(record["mode"] for record in timed))
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(7 * len(modes), 5.5), squeeze=False, layout="constrained"
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        _draw(panel, [record for record in timed if record["mode"] == mode], sizes)
        panel.set_title(mode)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw(panel: Any, records: Sequence[Record], sizes: Sequence[Size]) -> None:
    for provider in dict.fromkeys(record["provider"] for record in records):
        mine = [record for record in records if record["provider"] == provider]
        at = [next(i for i, size in enumerate(sizes) if size.items() <= r.items()) for r in mine]
        middle = [r["median_ms"] for r in mine]
        below = [r["median_ms"] - r["p20_ms"] for r in mine]
        above = [r["p80_ms"] - r["median_ms"] for r in mine]
        if provider == OURS:
            look: dict[str, Any] = {"color": "black", "linewidth": 3, "zorder": 3}
        elif mine[0]["is_bound"]:
            look = {"color": "gray", "linestyle": ":"}
        else:
            look = {"linewidth": 1.2}
        panel.errorbar(at, middle, (below, above), marker="o", label=_label(mine[0]), **look)
    labels = ["\n".join(f"{name} {value}" for name, value in size.items()) for size in sizes]
    panel.set_xticks(range(len(sizes)), labels, fontsize=7)
    panel.set_yscale("log")
    panel.set_ylabel("ms: median, p20 to p80")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8)
