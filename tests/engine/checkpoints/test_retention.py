import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.retention import Retention, step_name, step_of, superseded

LOSSES: dict[int, dict[str, Any]] = {
    2: {"valid/loss": 3.0},
    4: {"valid/loss": 1.0},
    6: {"valid/loss": 2.0},
    8: {"valid/loss": 1.0},
    10: {"valid/loss": 2.5},
}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=2), {8, 10}),
        (Retention(last=0), {10}),  # the newest always
        (Retention(last=9), {2, 4, 6, 8, 10}),
        (Retention(last=1, every=4), {4, 8, 10}),
        (Retention(last=1, lowest="valid/loss"), {8, 10}),  # the latest of equal ones
        (Retention(last=1, highest="valid/loss"), {2, 10}),
        (Retention(last=1, every=6, lowest="valid/loss", highest="valid/loss"), {2, 6, 8, 10}),
        (Retention(last=1, lowest="another/metric"), {10}),
        (Retention(last=1, newest_of=4), {8, 10}),
        (Retention(last=1, newest_of=5), {10}),
        (Retention(last=1, newest_of=7), {10}),
    ],
)
def test_rules_add_up(retention: Retention, kept: set[int]):
    assert retention.kept(LOSSES) == kept


def test_value_that_is_no_finite_number_rates_nothing():
    values = [math.nan, -math.inf, None, "0", True, 10**400, [0.0]]
    metrics = {step: {"a/b": value} for step, value in enumerate(values, start=1)}
    assert Retention(last=1, lowest="a/b", highest="a/b").kept(metrics) == {7}
    metrics[2] = {"a/b": -5}
    assert Retention(last=1, lowest="a/b", highest="a/b").kept(metrics) == {2, 7}


def test_metrics_that_checkpoints_are_kept_by_and_a_new_one_lacks():
    retention = Retention(last=1, lowest="a/b", highest="c/d")
    (said,) = retention.missing({"c/d": 1.0, "a/c": 1.0}).values()
    assert "by a/b, " in said and "this one has a/c, c/d: name" in said
    assert [*retention.missing({})] == ["a/b", "c/d"]
    assert "this one has none" in retention.missing({})["a/b"]
    assert retention.missing({"a/b": math.nan, "c/d": 1.0}) == {}
    assert Retention(last=1).missing({}) == {}


def test_name_says_the_step():
    assert (step_name(7), step_name(123456789)) == ("step_00000007", "step_123456789")
    assert (step_of("step_00000007"), step_of("step_123456789")) == (7, 123456789)
    for name in ("step_7", "step_00000007.partial", "xstep_00000007", "epoch_0001", "", "latest"):
        assert step_of(name) is None
    assert step_of("step_٠٠٠٠٠٠٠٧") is None
    assert step_of("step_00000007\n") is None


def saved(directory: Path, step: int, loss: object) -> Path:
    folder = directory / step_name(step)
    folder.mkdir()
    progress = {"step": step, "metrics": {"valid/loss": loss}}
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_checkpoints_of_later_steps_and_other_names_stay(tmp_path: Path):
    for step in (2, 4, 6, 8, 20):
        saved(tmp_path, step, 1.0)
    for name in ("latest", "epoch_0001", "step_00000001.partial", "notes"):
        (tmp_path / name).mkdir()
    found = superseded(tmp_path, 8, Retention(last=2))
    assert names(found) == ["step_00000002", "step_00000004"]


def test_lowest_is_looked_up_in_what_was_saved(tmp_path: Path):
    for step, loss in ((2, 1.0), (4, 0.5), (6, 3.0), (8, 2.0)):
        saved(tmp_path, step, loss)
    found = superseded(tmp_path, 8, Retention(last=1, lowest="valid/loss"))
    assert names(found) == ["step_00000002", "step_00000006"]


def test_damaged_checkpoint_counts_for_nothing_and_goes(tmp_path: Path):
    for step, loss in ((2, 1.0), (4, 0.5), (6, 0.1), (8, 2.0)):
        saved(tmp_path, step, loss)
    keep = Retention(last=2, lowest="valid/loss")
    assert names(superseded(tmp_path, 8, keep, damaged={6})) == ["step_00000002", "step_00000006"]
    # The one just written is sound whatever its step was before.
    assert "step_00000008" not in names(superseded(tmp_path, 8, keep, damaged={6, 8}))


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"metrics": []}', "\0", "[" * 99999])
def test_unreadable_progress_has_no_metrics(content: str, tmp_path: Path):
    (saved(tmp_path, 2, 0.0) / "progress.json").write_text(content)
    saved(tmp_path, 4, 1.0)
    saved(tmp_path, 6, 2.0)
    found = superseded(tmp_path, 6, Retention(last=1, lowest="valid/loss"))
    assert names(found) == ["step_00000002"]


def test_pipe_in_the_place_of_progress_is_not_waited_for(tmp_path: Path):
    path = saved(tmp_path, 2, 0.0) / "progress.json"
    path.unlink()
    os.mkfifo(path)
    saved(tmp_path, 4, 1.0)
    found = superseded(tmp_path, 4, Retention(last=1, lowest="valid/loss"))
    assert names(found) == ["step_00000002"]
