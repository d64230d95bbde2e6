"""Generated config files and command lines: each is a config or an error of a line or two."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.quickstart.settings import QuickstartConfig
from engine.settings.checks import check_values
from engine.settings.command_line import parse_config
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.saved import changed_fields, load_config, save_config
from engine.settings.sft import SFTConfig
from tests.engine.settings.small_stage import StageConfig
from tests.fuzzing import fuzzed

CONFIGS = {
    "sft": SFTConfig(),
    "rm": RMConfig(),
    "ppo": PPOConfig(critic_layout=ParallelLayout(tp=2)),
    "generate": GenerateConfig(),
    "quickstart": QuickstartConfig(),
}
TEXT = st.text(st.characters(), max_size=20)
NUMBERS = st.sampled_from([0, 1, -1, 2**62, 10**30, 10**400, 1e308, 1.0, -0.0, 2**31])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), NUMBERS, TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["change", "change", "remove", "add", "deepen"])
EDITS = st.lists(st.tuples(KINDS, st.integers(0, 200), VALUES), min_size=1, max_size=3)
SPLICE = st.tuples(st.integers(0, 5000), st.integers(0, 3), st.binary(max_size=5))


def fields_in(values: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += fields_in(value, (*path, name))
    return found


def edited(values: dict, edits: list[tuple[str, int, Any]]) -> dict:
    """Return a saved config in which some fields are others, are gone, or are new."""
    values = copy.deepcopy(values)
    for kind, number, value in edits:
        paths = fields_in(values)
        if not paths:
            break
        *path, name = paths[number % len(paths)]
        part = values
        for key in path:
            part = part[key]
        if kind == "remove":
            del part[name]
        elif kind == "add":
            part[name + "\n\x1b"[: number % 3]] = value
        else:
            for _ in range(number if kind == "deepen" else 0):
                value = [value] if number % 2 else {name: value}
            part[name] = value
    return values


def holds(values: Any, given_values: Any) -> bool:
    """Return whether a config holds what a file has given it: paths may be written otherwise, and
    a float has not all digits of a whole number."""
    if isinstance(given_values, dict):
        return all(holds(values[name], value) for name, value in given_values.items())
    if isinstance(given_values, str):
        return isinstance(values, str)
    if isinstance(values, float) and type(given_values) in (int, float):
        return values == float(given_values) or values != values  # NaN
    return values == given_values


def short(error: UserError) -> bool:
    return len(str(error).split("\n")) <= 2 and 0 < len(str(error)) < 2000


def check_file(name: str, path: Path) -> None:
    """Have a config's file loaded and compared, and hold the outcome against it."""
    config = CONFIGS[name]
    try:
        found = load_config(type(config), path)
        check_values(found)
    except UserError as error:
        assert short(error)
        assert "\n" not in str(error)
    else:
        save_config(found, path.with_name("again.json"))
        saved = json.loads(path.with_name("again.json").read_text())
        assert holds(saved, json.loads(path.read_bytes()))
        assert load_config(type(config), path.with_name("again.json")) == found
    try:
        changed_fields(config, path)
    except UserError as error:
        assert short(error)
        assert "c.json" in str(error)


@pytest.fixture
def saved(tmp_path: Path, name: str) -> dict:
    save_config(CONFIGS[name], tmp_path / "whole.json")
    return json.loads((tmp_path / "whole.json").read_text())


@pytest.mark.fuzz
@pytest.mark.parametrize("name", CONFIGS)
@fuzzed
@given(edits=EDITS)
def test_an_edited_config_is_loaded_or_refused(
    name: str, saved: dict, tmp_path: Path, edits: list[tuple[str, int, Any]]
):
    (tmp_path / "c.json").write_text(json.dumps(edited(saved, edits)))
    check_file(name, tmp_path / "c.json")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", CONFIGS)
@fuzzed
@given(splices=st.lists(SPLICE, min_size=1, max_size=3))
def test_a_damaged_config_is_loaded_or_refused(
    name: str, saved: dict, tmp_path: Path, splices: list[tuple[int, int, bytes]]
):
    content = json.dumps(saved).encode()
    for start, num_bytes, new in splices:
        start %= len(content)
        content = content[:start] + new + content[start + num_bytes :]
    (tmp_path / "c.json").write_bytes(content)
    check_file(name, tmp_path / "c.json")


OPTIONS = ["--data.path", "--data.skip-bad-lines", "--data.no-skip-bad-lines", "--lr", "--steps"]
OPTIONS += ["--mode", "--rule", "--betas", "--seeds", "--weights", "--data", "-", "--", "=", "@"]
WORDS = st.one_of(
    st.sampled_from(OPTIONS),
    TEXT,
    VALUES.map(str),
    st.sampled_from(["9" * 5000, "1e999", "nan", "-inf", "\udcff", "a\0b", "x" * 5000, "[/b]", ""]),
    st.tuples(st.sampled_from(OPTIONS), TEXT).map("=".join),
)
PAIRS = st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), min_size=1, max_size=3)
LINES = st.lists(WORDS, min_size=1, max_size=6) | PAIRS.map(lambda pairs: [*sum(pairs, ())])


@pytest.mark.fuzz
@fuzzed
@given(words=LINES)
def test_a_command_line_is_a_config_or_an_error(words: list[str], capsys):
    try:
        found = parse_config(StageConfig(), words)
    except UserError as error:
        assert short(error)
    except SystemExit as stop:
        assert not stop.code and {"-h", "--help"} & set(words)
    else:
        check_values(found)
        assert isinstance(found, StageConfig)
    capsys.readouterr()
