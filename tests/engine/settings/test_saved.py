from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.settings.saved import (
    EARLIER,
    changed_fields,
    load_config,
    save_config,
    with_saved_fields,
)
from tests.engine.settings.small_stage import DataConfig, Rule, StageConfig


@pytest.mark.parametrize(
    "config",
    [
        StageConfig(),
        StageConfig(
            data=DataConfig(path=Path("/x y/z"), skip_bad_lines=True),
            lr=float("inf"),
            mode="adaptive",
            rule=Rule.replace,
            betas=(0.5, 0.25),
            seeds=(1, 2, 3),
            weights={"a": 1.5},
        ),
    ],
)
def test_saved_config_reads_back_equal(tmp_path, config):
    save_config(config, tmp_path / "run" / "config.json")
    assert load_config(StageConfig, tmp_path / "run" / "config.json") == config
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_saved_fields_are_put_back_however_deep_they_are(tmp_path):
    old = StageConfig(data=DataConfig(path=Path("/x")), lr=2.0, rule=Rule.replace, seeds=(1, 2))
    new = StageConfig(steps=3, mode="adaptive")
    save_config(old, tmp_path / "c.json")
    changed = changed_fields(new, tmp_path / "c.json")
    assert with_saved_fields(new, {name: saved for name, (saved, _) in changed.items()}) == old
    assert with_saved_fields(new, {}) == new
    with pytest.raises(UserError, match=r"data\.path cannot be 7"):
        with_saved_fields(new, {"data.path": 7})
    with pytest.raises(UserError, match="steps 0 must be at least 1"):
        with_saved_fields(new, {"steps": 0})


def test_missing_field_takes_its_default_and_an_integer_serves_as_a_float(tmp_path):
    (tmp_path / "c.json").write_text('{"lr": 3}')
    config = load_config(StageConfig, tmp_path / "c.json")
    assert config == StageConfig(lr=3.0)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"lr": ', "line 1"),
        ('{"data": {"pth": "x"}}', "unknown field data.pth"),
        ('{"lr": "fast"}', "lr cannot be 'fast'"),
        ('{"steps": 1.5}', "steps cannot be 1.5"),
        ('{"mode": "other"}', "mode cannot be 'other'"),
        ('{"rule": "none"}', "rule cannot be 'none'"),
        ('{"betas": [0.9]}', "betas wants 2 values, not 1"),
        ('{"seeds": [1, "a"]}', "seeds.1 cannot be 'a'"),
        ('{"lr": 1' + "0" * 2000 + "}", "lr is too large: 1000"),
        ('{"lr": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"lr": ' + '["x", ' * 100_000 + "0" + "]" * 100_000 + "}", "not JSON"),
        ('{"lr": ' + "[" * 500 + "]" * 500 + "}", "lr cannot be [[["),
        ('{"data": {"path": ' + "[" * 100_000, "not JSON"),
        ('{"mode": "' + "x" * 900_000 + '"}', "mode cannot be 'xxx"),
        ('{"' + "k" * 900_000 + '": 1}', "unknown field kkk"),
        ('{"weights": {"' + "k" * 900_000 + '": "x"}}', "weights cannot be {'kkk"),
        ('{"steps": -1}', "steps -1 must be at least 1"),
        ("[1]", "a list where an object should be"),
    ],
)
def test_bad_config_file_names_the_file_and_the_field(tmp_path, text, cause):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(StageConfig, tmp_path / "c.json")
    assert str(error.value).startswith(f"{tmp_path / 'c.json'}: ")
    assert cause in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_saved_settings_are_compared_however_deep_they_are(tmp_path, monkeypatch):
    deep: dict = {"lr": 2.0}
    for _ in range(5000):  # Python 3.12 reads JSON deeper than its functions may call one another
        deep = {"lr": 2.0, "data": deep}
    monkeypatch.setattr("engine.settings.saved.read_object", lambda path, max_bytes: deep)
    assert changed_fields(StageConfig(), tmp_path / "c.json") == {"lr": (2.0, 1e-3)}
    with pytest.raises(UserError, match=r"c\.json: unknown field data\.data"):
        load_config(StageConfig, tmp_path / "c.json")


@dataclass(frozen=True, kw_only=True)
class LaterData:
    path: Path | None = None
    share: float = field(default=0.05, metadata={EARLIER: 0.0})


@dataclass(frozen=True, kw_only=True)
class LaterStage:
    data: LaterData = LaterData()
    count: int = field(default=2, metadata={EARLIER: 1})


def test_a_file_from_before_a_field_is_compared_by_what_runs_did_then(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"data": {"path": null}}')
    assert changed_fields(LaterStage(), path) == {"data.share": (0.0, 0.05), "count": (1, 2)}
    assert changed_fields(LaterStage(data=LaterData(share=0.0), count=1), path) == {}
    path.write_text("{}")
    assert changed_fields(LaterStage(), path) == {"data.share": (0.0, 0.05), "count": (1, 2)}
    save_config(LaterStage(), path)
    assert changed_fields(LaterStage(), path) == {}


def test_a_file_from_before_a_field_is_read_as_what_runs_did_then(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"data": {"path": null}}')
    assert load_config(LaterStage, path) == LaterStage(data=LaterData(share=0.0), count=1)
    save_config(LaterStage(), path)
    assert load_config(LaterStage, path) == LaterStage()


def test_a_file_of_megabytes_is_no_config(tmp_path):
    (tmp_path / "c.json").write_text("{}" + " " * 2**24)
    with pytest.raises(UserError, match=r"c\.json has 16777218 bytes; 16777216 are the most"):
        load_config(StageConfig, tmp_path / "c.json")


def test_missing_config_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(StageConfig, tmp_path / "absent.json")


def test_save_refuses_a_value_that_would_not_read_back(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a object"):
        save_config(StageConfig(weights={"a": object()}), tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
