"""The measurements of a case as a table for the terminal, those of an operation as a plot."""

import itertools
from collections.abc import Mapping, Sequence
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
    for reason, group in itertools.groupby(skipped, key=lambda record: record["reason"]):
        names = ", ".join(record["provider"] for record in group)
        lines.append(f"skipped, {reason}: {names}")
    return "\n".join(lines)


def plot(records: Sequence[Record], sizes: Sequence[Size], title: str, path: Path) -> None:
    """Draw milliseconds into a file: a panel a mode, a column a size, a mark a provider."""
    mpl.use("agg")
    from matplotlib import pyplot

    timed = _with_status(records, "timed")
    modes = list(dict.fromkeys(record["mode"] for record in timed))
    width = 3 + max(4.0, 1.2 * len(sizes)) * len(modes)
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(width, 4.5), squeeze=False, layout="constrained"
    )
    sizes = sorted(sizes, key=lambda size: tuple(size.values()))
    providers = dict.fromkeys(record["provider"] for record in timed)
    colors = dict(zip(providers, itertools.cycle(mpl.colormaps["tab20"].colors), strict=False))
    for panel, mode in zip(panels[0], modes, strict=True):
        _draw(panel, [record for record in timed if record["mode"] == mode], sizes, colors)
        panel.set_title(mode, fontsize=9)
    figure.suptitle(title, fontsize=9)
    # The first panel has all providers: who has a backward has a forward.
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(
    panel: Any, records: Sequence[Record], sizes: Sequence[Size], colors: Mapping[str, Any]
) -> None:
    providers = list(dict.fromkeys(record["provider"] for record in records))
    for rank, provider in enumerate(providers):
        mine = [record for record in records if record["provider"] == provider]
        column = [next(i for i, s in enumerate(sizes) if s.items() <= r.items()) for r in mine]
        # Side by side within the column of their size.
        place = [i + 0.7 * (rank / max(1, len(providers) - 1) - 0.5) for i in column]
        middle = [r["median_ms"] for r in mine]
        below = [r["median_ms"] - r["p20_ms"] for r in mine]
        above = [r["p80_ms"] - r["median_ms"] for r in mine]
        look: dict[str, Any] = {"fmt": "o", "markersize": 5, "color": colors[provider]}
        if provider == OURS:
            look = {"fmt": "D", "markersize": 8, "color": "black"}
        elif mine[0]["is_bound"]:
            look = {"fmt": "_", "markersize": 12, "color": "gray"}
        panel.errorbar(place, middle, (below, above), label=_label(mine[0]), **look)
    for edge in range(1, len(sizes)):
        panel.axvline(edge - 0.5, color="lightgray", linewidth=0.8)
    labels = ["\n".join(f"{name} {value}" for name, value in size.items()) for size in sizes]
    panel.set_xticks(range(len(sizes)), labels, fontsize=7)
    panel.set_xlim(-0.5, len(sizes) - 0.5)
    panel.set_yscale("log")
    panel.set_ylabel("ms: median, p20 to p80", fontsize=8)
    panel.grid(axis="y", alpha=0.3)
