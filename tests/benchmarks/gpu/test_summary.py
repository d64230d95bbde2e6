"""Every target has a line that says right, wrong, does not compile or slower than target."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.spend import Outcome
from benchmarks.gpu.summary import (
    NOT_JUDGED,
    Line,
    kernel_lines,
    read_outcomes,
    step_lines,
    target_lines,
)
from benchmarks.gpu.targets import COPY, TARGETS

GAE, LOGPROBS = TARGETS[2].name, TARGETS[0].name


def check(operation: str, verdict: str, **more: Any) -> dict[str, Any]:
    case = {"benchmark": "kernel_check", "operation": operation, "size_kind": "odd"}
    errors = {"errors": {"out": 1e-7}, "tolerances": {"out": 1e-3}} if verdict == "right" else {}
    return case | {"mode": "forward", "verdict": verdict} | errors | more


def timed(operation: str, provider: str, ms: float, **more: Any) -> dict[str, Any]:
    record = {"benchmark": "kernels", "operation": operation, "provider": provider}
    record |= {"status": "timed", "median_ms": ms, "is_bound": provider == COPY, "gb_per_s": 3e3}
    return record | {"mode": "forward+backward", "date": "2026-01-01", "commit": "abc"} | more


def gae(ms: float, wall: float, launches: int = 1) -> list[dict[str, Any]]:
    size = {"sequences": 512, "length": 1024, "mode": "forward"}
    ours = timed("gae", "trident", ms, wall_ms=wall, launches=launches, **size)
    return [ours, timed("gae", "verl: loop", 90.0, wall_ms=None, **size)]


def logprobs(ours: float, rival: float = 9.0) -> list[dict[str, Any]]:
    size = {"tokens": 32768, "vocab": 16}
    calls = {COPY: 0.9, "trident": ours, "Liger": rival}
    return [timed("logprobs", name, ms, **size) for name, ms in calls.items()]


def line_of(name: str, records: list, outcomes: dict | None = None, *, judges: bool = True) -> Line:
    lines = target_lines(records, outcomes or {}, judges_speed=judges)
    assert [line.name for line in lines] == [target.name for target in TARGETS]
    return next(line for line in lines if line.name == name)


def test_a_target_that_is_met_is_right_and_one_that_is_missed_is_slower():
    assert line_of(GAE, gae(0.01, 0.03)).verdict == "right"
    assert line_of(GAE, gae(0.01, 0.05)).verdict == "slower than target"
    assert line_of(GAE, gae(0.01, 0.03, launches=2)).verdict == "slower than target"
    assert line_of(LOGPROBS, logprobs(0.95)).verdict == "right"
    assert line_of(LOGPROBS, logprobs(1.2)).verdict == "slower than target"
    assert line_of(LOGPROBS, logprobs(0.95, rival=0.94)).verdict == "slower than target"
    assert line_of(GAE, gae(0.01, 0.03), judges=False).verdict == NOT_JUDGED
    elsewhere = [record | {"length": 512} for record in gae(0.01, 0.03)]
    assert line_of(GAE, elsewhere).verdict == NOT_JUDGED  # the target is of another size


@pytest.mark.parametrize("verdict", ["wrong", "does not compile", "fails"])
def test_a_kernel_that_is_not_right_is_what_its_target_says(verdict):
    records = [*gae(0.01, 0.03), check("gae", verdict, reason="ptxas says no\nand more")]
    line = line_of(GAE, records)
    assert line.verdict == verdict
    assert "ptxas says no" in line.detail
    # Once mended it is right again: the newest check counts.
    assert line_of(GAE, [*records, check("gae", "right")]).verdict == "right"


def test_a_case_timed_as_wrong_is_wrong_until_a_newer_run_has_it_right():
    wrong = gae(0.01, 0.03)[0] | {"status": "wrong", "errors": {"out": 1.0}}
    assert line_of(GAE, [wrong]).verdict == "wrong"
    mended = [record | {"date": "2026-01-02"} for record in gae(0.01, 0.03)]
    assert line_of(GAE, [wrong, *mended]).verdict == "right"


def test_a_case_that_was_begun_and_never_ended_is_named():
    outcome = Outcome(step="check gae", status="died", seconds=3, tail=["illegal access"])
    records = [check("gae", "right", mode="forward"), check("gae", "begun", size_kind="real")]
    (line,) = kernel_lines(records, {"check gae": outcome})
    assert line.verdict == "ended the process"
    assert line.detail == "real size, forward: illegal access"


def test_a_check_that_was_interrupted_is_no_verdict():
    records = [check("gae", "right"), check("gae", "begun")]
    for outcomes in ({}, {"check gae": Outcome(step="check gae", status="cut short")}):
        (line,) = kernel_lines(records, outcomes)
        assert line.verdict == "right"


def test_a_target_without_a_measurement_says_what_became_of_its_step():
    assert line_of(GAE, []).detail == "its step has not run"
    outcome = Outcome(step="time gae, policy_loss", status="hung", seconds=60, tail=["compiling"])
    line = line_of(GAE, [], {outcome.step: outcome})
    assert (line.verdict, line.detail) == (
        "not measured",
        "time gae, policy_loss hung after 60 s: compiling",
    )
    assert [found.name for found in step_lines({outcome.step: outcome})] == [outcome.step]


def test_outcomes_are_read_again_and_a_cut_line_is_left_out(tmp_path: Path):
    lines = [{"step": "a", "status": "hung"}, {"step": "a", "status": "done"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": "b", "st'
    (tmp_path / "steps.jsonl").write_text(text)
    outcomes = read_outcomes(tmp_path)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"a": "done"}
