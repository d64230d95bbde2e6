"""How cost grows with every size, beside what is expected, so that an accidental square shows.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --out DIR
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --quick --only host

On a CPU, on one thread, in CPU seconds of the process, which a machine that others use changes
least. It ends with status 1 where something grows faster than it should.
"""

import argparse
import dataclasses
import gc
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.table import Table

from benchmarks.command_line import command, mistakes_in_one_line
from benchmarks.scaling import host, one_rank, rank, ranks
from benchmarks.scaling.curve import Curve
from benchmarks.screen import print_whole, screen
from benchmarks.timing import append_record, machine, records_path
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout

SECTIONS = ("host", "one_rank", "ranks")


def curves_of(section: str, *, is_quick: bool) -> Iterator[Curve]:
    """Yield the curves of a section as they are measured."""
    if section == "ranks":
        yield from ranks.curves((2,) if is_quick else (2, 4))
        return
    module = host if section == "host" else one_rank
    for question in module.questions():
        yield question.ask(is_quick=is_quick)


@mistakes_in_one_line()
def main() -> None:
    """Measure, print each curve as it is there and a table; write records and plots with --out."""
    arguments = _parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # threads that wait for one another count as CPU seconds
    gc.collect()
    gc.freeze()  # else a size that makes the collector look at the libraries' objects seems dear
    where = machine(torch.device("cpu"), torch.float32)
    console = screen()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    found: list[Curve] = []
    for section in arguments.only:
        curves: list[Curve] = []
        for curve in curves_of(section, is_quick=arguments.quick):
            curves.append(curve)
            console.print(line_of(curve), markup=False, highlight=False)
            if arguments.out:
                path = records_path(arguments.out, torch.device("cpu"))
                append_record(path, record_of(curve) | {"is_quick": arguments.quick} | where)
        found += curves
        if arguments.out:
            plot(curves, arguments.out / "cpu" / f"scaling_{section}.png")
    print_whole(console, _table(found))
    if "ranks" in arguments.only:
        alone = rank.measure(start_parallel(ParallelLayout(), seed=0), 8)
        counts = ", ".join(f"{values['alone']:.0f} a {job}" for job, values in alone.items())
        console.print(f"collectives of a rank that is alone, which nobody needs: {counts}")
    too_fast = [curve for curve in found if not curve.is_as_expected]
    if too_fast:
        names = "\n".join(f"  {line_of(curve)}" for curve in too_fast)
        raise SystemExit(f"grows faster than it should:\n{names}")


def line_of(curve: Curve) -> str:
    """Return a curve in a line."""
    verdict = "as expected" if curve.is_as_expected else "TOO FAST"
    over = f", {curve.most_over_formula:.2f} x the formula" if curve.is_absolute else ""
    return (
        f"{curve.what}: {curve.unit} ~ {curve.variable}^{curve.exponent:.2f}, expected "
        f"{curve.expected_exponent:.2f}{over}: {verdict}"
    )


def record_of(curve: Curve) -> dict[str, Any]:
    """Return a curve as a record."""
    return {
        "benchmark": "scaling",
        **dataclasses.asdict(curve),
        "exponent": curve.exponent,
        "last_slope": curve.last_slope,
        "expected_exponent": curve.expected_exponent,
        "is_as_expected": curve.is_as_expected,
    }


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw a panel a curve into a file: what was measured, and the formula through its last
    point."""
    mpl.use("agg")
    from matplotlib import pyplot

    num_columns = 4
    num_rows = math.ceil(len(curves) / num_columns)
    figure, panels = pyplot.subplots(
        num_rows, num_columns, figsize=(16, 3.2 * num_rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel, curve in zip(panels.flat, curves, strict=False):
        factor = 1.0 if curve.is_absolute else curve.costs[-1] / curve.expected_costs[-1]
        formula = [factor * cost for cost in curve.expected_costs]
        panel.loglog(curve.sizes, formula, "--", color="0.6", label=f"~ {curve.formula}"[:40])
        color = "C0" if curve.is_as_expected else "C3"
        panel.loglog(curve.sizes, curve.costs, "o-", color=color, label=f"{curve.exponent:.2f}")
        panel.set_title(curve.what, fontsize=7)
        panel.set_xlabel(curve.variable, fontsize=7)
        panel.set_ylabel(curve.unit, fontsize=7)
        panel.tick_params(labelsize=6, which="both")
        panel.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _table(curves: Sequence[Curve]) -> Table:
    table = Table("what", "against", "sizes", "unit", "cost", "exponent", "at the end", "expected")
    table.add_column("as expected")
    for curve in curves:
        table.add_row(
            curve.what,
            curve.variable,
            f"{curve.sizes[0]:,} to {curve.sizes[-1]:,}",
            curve.unit,
            f"{curve.costs[0]:,.4g} to {curve.costs[-1]:,.4g}",
            f"{curve.exponent:.2f}",
            f"{curve.last_slope:.2f}",
            f"{curve.expected_exponent:.2f} + {curve.tolerance:.2f}",
            "yes" if curve.is_as_expected else "NO",
        )
    return table


def _parse() -> argparse.Namespace:
    parser = command("scaling")
    parser.add_argument("--quick", action="store_true", help="small sizes, two ranks: a minute")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, help="folder for JSON lines (appended) and plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
