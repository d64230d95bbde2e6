from pathlib import Path

import pytest

from engine.errors import UserError
from engine.settings.saved import load_config, save_config
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
        ("[1]", "a list where an object should be"),
    ],
)
def test_bad_config_file_names_the_file_and_the_field(tmp_path, text, cause):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(StageConfig, tmp_path / "c.json")
    assert str(error.value).startswith(f"{tmp_path / 'c.json'}: ")
    assert cause in str(error.value)


def test_missing_config_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(StageConfig, tmp_path / "absent.json")


def test_save_refuses_a_value_that_would_not_read_back(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a object"):
        save_config(StageConfig(weights={"a": object()}), tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
