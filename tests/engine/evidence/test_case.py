"""A case is what was written, or an error in words."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from engine.errors import UserError
from engine.evidence.case import CASE, Case, read_case
from tests.engine.checkpoints.near_json import near, refused_or_read
from tests.fuzzing import fuzzed

FOUND = Case(
    stage="ppo",
    step=12,
    position=13,
    role="policy",
    reason="policy_loss is nan",
    loss_scale=512.0,
    numbers={"mean": math.nan, "rstd": 1.5},
    sources={"reference": "0f" * 16},
)


def test_a_case_comes_back_and_names_its_folder(tmp_path: Path):
    (tmp_path / CASE).write_text(FOUND.as_text())
    assert repr(read_case(tmp_path)) == repr(FOUND)
    assert FOUND.name == "step_00000012_policy" and FOUND.networks == ("policy",)
    rollout = dataclasses.replace(FOUND, role="rollout")
    assert rollout.name == "step_00000012_rollout" and rollout.networks == ("policy", "critic")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage", "pretrain"),
        ("step", -1),
        ("step", 1.0),
        ("position", None),
        ("role", "../policy"),
        ("reason", None),
        ("loss_scale", 0),
        ("numbers", {"mean": "x"}),
        ("sources", {"reference": 7}),
        ("more", 1),
    ],
)
def test_other_values_are_refused(name: str, value: Any, tmp_path: Path):
    case = json.loads(FOUND.as_text()) | {name: value}
    (tmp_path / CASE).write_text(json.dumps(case))
    with pytest.raises(UserError, match=f"case.json: '{name}' cannot be"):
        read_case(tmp_path)


def test_a_case_of_before_sources_were_kept_is_read(tmp_path: Path):
    case = {k: value for k, value in json.loads(FOUND.as_text()).items() if k != "sources"}
    (tmp_path / CASE).write_text(json.dumps(case))
    assert repr(read_case(tmp_path)) == repr(dataclasses.replace(FOUND, sources={}))


def test_another_format_is_refused(tmp_path: Path):
    (tmp_path / CASE).write_text("{}")
    with pytest.raises(UserError, match="not a skipped step of format 1"):
        read_case(tmp_path)


@pytest.mark.fuzz
@fuzzed
@given(case=near(json.loads(FOUND.as_text())))
def test_any_case_is_read_or_refused(case: Any, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_case"
    folder.mkdir(exist_ok=True)
    (folder / CASE).write_text(json.dumps(case))
    found = refused_or_read(lambda: read_case(folder))
    assert found is None or found.name.startswith(f"step_{found.step:08d}_")
