"""The table at the end: right, wrong, does not compile or slower than target, line by line.

It is made from the files of a run's folder alone, so that a run which was killed has one too.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from benchmarks.gpu.spend import Outcome
from benchmarks.gpu.targets import TARGETS, Target
from benchmarks.records import Record, kernel_case, newest, read_lines

NOT_JUDGED = "right, speed not judged"
_STYLES = {"right": "green", NOT_JUDGED: "green", "slower than target": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A target, a kernel or a step, and what is known of it."""

    name: str
    verdict: str
    detail: str


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Return what became of each step, its last time; {} where none has ended."""
    outcomes = {}
    for line in read_lines(folder / "steps.jsonl"):
        with contextlib.suppress(ValueError, TypeError):  # a line that a killed run has cut
            outcome = Outcome(**json.loads(line))
            outcomes[outcome.step] = outcome
    return outcomes


def kernel_lines(records: Sequence[Record], outcomes: dict[str, Outcome]) -> list[Line]:
    """Return a line a kernel: the worst of its cases, each the last time that it was checked."""
    cases: dict[str, dict[tuple, Record]] = {}
    for record in (r for r in records if r["benchmark"] == "kernel_check"):
        case = (record["size_kind"], record["mode"])
        if record["verdict"] == "begun" and not _ended_badly(record["operation"], outcomes):
            continue  # somebody ended the run
        cases.setdefault(record["operation"], {})[case] = record
    lines = []
    for operation, found in cases.items():
        bad = [(case, r) for case, r in found.items() if r["verdict"] != "right"]
        if not bad:
            worst = max(
                (error / record["tolerances"][name], name, error)
                for record in found.values()
                for name, error in record["errors"].items()
            )
            detail = f"{len(found)} cases; nearest to its tolerance: {worst[1]} {worst[2]:.1e}"
            lines.append(Line(name=operation, verdict="right", detail=detail))
            continue
        (size, mode), record = bad[0]
        verdict = record["verdict"]
        detail = record.get("reason") or str(record.get("errors", ""))
        if verdict == "begun":
            outcome = outcomes.get(f"check {operation}")
            verdict = "hung" if outcome and outcome.status == "hung" else "ended the process"
            detail = outcome.tail[-1] if outcome and outcome.tail else ""
        lines.append(Line(name=operation, verdict=verdict, detail=f"{size} size, {mode}: {detail}"))
    return lines


def _ended_badly(operation: str, outcomes: dict[str, Outcome]) -> bool:
    """Whether the process that checked a kernel ended of itself before it was through, or hung."""
    outcome = outcomes.get(f"check {operation}")
    return outcome is not None and outcome.status in ("failed", "died", "hung")


def target_lines(
    records: Sequence[Record], outcomes: dict[str, Outcome], *, judges_speed: bool
) -> list[Line]:
    """Return a line a target. A kernel that is not right is what there is to say of its target."""
    kernels = {line.name: line for line in kernel_lines(records, outcomes)}
    return [_target_line(target, records, outcomes, kernels, judges_speed) for target in TARGETS]


def _target_line(
    target: Target,
    records: Sequence[Record],
    outcomes: dict[str, Outcome],
    kernels: dict[str, Line],
    judges_speed: bool,
) -> Line:
    bad = [kernels[name] for name in target.operations if name in kernels]
    bad = [line for line in bad if line.verdict != "right"]
    if bad:
        detail = f"{bad[0].name}: {_first_line(bad[0].detail)}"
        return Line(name=target.name, verdict=bad[0].verdict, detail=detail)
    ours = [
        r
        for r in records
        if r["benchmark"] == "kernels"
        and r["operation"] in target.operations
        and r["provider"] == "trident"
    ]
    wrong = [r for r in newest(ours, kernel_case) if r["status"] in ("wrong", "failed")]
    if wrong:
        detail = str(wrong[-1].get("reason") or wrong[-1].get("errors"))
        return Line(name=target.name, verdict="wrong", detail=detail)
    finding = target.judge(records)
    if finding is None:
        return Line(name=target.name, verdict="not measured", detail=_why(target, outcomes))
    if not judges_speed or finding.is_met is None:
        return Line(name=target.name, verdict=NOT_JUDGED, detail=finding.measured)
    verdict = "right" if finding.is_met else "slower than target"
    return Line(name=target.name, verdict=verdict, detail=finding.measured)


def _why(target: Target, outcomes: dict[str, Outcome]) -> str:
    """Why a target has no measurement, as far as its steps say."""
    known = [o for name, o in outcomes.items() if name in target.steps]
    if not known:
        return "its step has not run"
    last = known[-1]
    if last.status == "done":
        return f"{last.step} ended well without the record"
    detail = f": {last.tail[-1]}" if last.tail else ""
    return f"{last.step} {last.status} after {last.seconds:.0f} s{detail}"


def step_lines(outcomes: dict[str, Outcome]) -> list[Line]:
    """Return a line a step that is not done."""
    return [
        Line(
            name=outcome.step,
            verdict=outcome.status,
            detail=_first_line(outcome.tail[-1]) if outcome.tail else "",
        )
        for outcome in outcomes.values()
        if outcome.status != "done"
    ]


def summary(
    records: Sequence[Record], outcomes: dict[str, Outcome], *, judges_speed: bool
) -> list[Table | Text]:
    """Return the tables: kernels, the steps that are not done, and last the targets."""
    parts = []
    if kernels := kernel_lines(records, outcomes):
        parts.append(_table("kernels against fp64", ("kernel",), kernels))
    if steps := step_lines(outcomes):
        parts.append(_table("steps that are not done", ("step",), steps))
    goals = {target.name: target.goal for target in TARGETS}
    lines = target_lines(records, outcomes, judges_speed=judges_speed)
    parts.append(_table("targets", ("what", "target"), lines, goals))
    whole = [
        Text(f"{line.name}: {line.verdict}\n{line.detail}")
        for line in kernels
        if line.verdict in ("does not compile", "fails")
    ]
    return [*whole[:1], *parts]


def _table(
    title: str, columns: tuple[str, ...], lines: Sequence[Line], goals: dict[str, str] | None = None
) -> Table:
    table = Table(*columns, "verdict", "", title=title, title_justify="left")
    for line in lines:
        goal = (goals[line.name],) if goals else ()
        verdict = Text(line.verdict, style=_STYLES.get(line.verdict, "red"))
        table.add_row(line.name, *goal, verdict, _first_line(line.detail))
    return table


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
