"""Code that tries values and gives up those that do not fit lets a user's mistake through."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.errors import UserError, cut, named, quoted
from engine.settings.adam import AdamConfig
from engine.settings.saved import load_config


@dataclass(frozen=True, kw_only=True)
class Config:
    adam: AdamConfig | None = None
    """None is tried where a saved value is no Adam's, and an Adam's ValueErrors are given up."""


def test_a_mistake_in_an_optional_part_is_told_as_it_is(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"adam": {"lr": -1.0}}))
    with pytest.raises(
        UserError, match=r"/config\.json: optimizer lr must be positive, got -1\.0$"
    ):
        load_config(Config, path)


def test_a_quoted_value_is_cut_without_being_written_whole() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**7, {"k" * 10**6: 1}, list(range(10**6)), deep, 10**4000, 10**9000):
        assert len(quoted(value)) < 200
    assert quoted("fast") == "'fast'"
    assert quoted({"a": [1, None]}) == "{'a': [1, None]}"
    assert cut("abc", 3) == "abc"
    assert cut("a" * 100 + "b" * 100, 6) == "aaaa[... 200 characters ...]bb"


def test_a_name_is_on_one_line_and_shows_what_it_holds() -> None:
    assert named(Path("/a b/caf\u00e9.txt")) == "/a b/caf\u00e9.txt"
    assert named("a\nb") == "'a\\nb'"
    assert named("\x1b]52;c\x07\u202e\udcff") == "'\\x1b]52;c\\x07\\u202e\\udcff'"
    assert len(named("\x1b" * 10**6)) < 400
