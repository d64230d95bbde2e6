import enum
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from engine.errors import UserError
from engine.recipe import run_stage
from engine.settings.checks import check_numbers
from engine.settings.command_line import parse_config
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.saved import load_config, save_config

ROOT = Path(__file__).parents[3]


class Rule(enum.Enum):
    penalty = 1
    replace = 2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: Path | None = None
    """Where the examples are."""
    skip_bad_lines: bool = False
    """Count bad lines instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    data: DataConfig = DataConfig()
    """What it reads."""
    lr: float = 1e-3
    """Peak learning rate."""
    steps: int = 10
    """Optimizer steps."""
    mode: Literal["fixed", "adaptive"] = "fixed"
    """How the coefficient moves."""
    rule: Rule = Rule.penalty
    """What happens without an end token."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decays."""
    seeds: tuple[int, ...] = ()
    """One run each."""
    weights: dict[str, float] | None = None
    """By name."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1")


def fails_with(capsys, arguments: list[str], train=lambda config: None) -> str:
    with pytest.raises(SystemExit) as stop:
        run_stage(train, StageConfig(), arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message


def test_options_replace_fields_of_the_default():
    seen = []
    arguments = ["--data.skip-bad-lines", "--data.path", "a/b", "--lr", "2", "--mode", "adaptive"]
    run_stage(seen.append, StageConfig(steps=7), arguments)
    data = DataConfig(path=Path("a/b"), skip_bad_lines=True)
    assert seen == [StageConfig(steps=7, data=data, lr=2.0, mode="adaptive")]


def test_no_option_leaves_the_default():
    assert parse_config(StageConfig(steps=7), []) == StageConfig(steps=7)


def test_optional_part_is_there_once_an_option_names_a_field_of_it(capsys):
    assert PPOConfig().critic_layout is None
    for arguments in (["--critic-layout.tp", "2"], ["--critic_layout.tp=2"]):
        found = parse_config(PPOConfig(), arguments)
        assert found.critic_layout == ParallelLayout(tp=2)
        assert found.generation_layout is None
    given = PPOConfig(critic_layout=ParallelLayout(tp=4))
    found = parse_config(given, ["--critic-layout.pp", "2"])
    assert found.critic_layout == ParallelLayout(tp=4, pp=2)
    with pytest.raises(SystemExit):
        run_stage(pytest.fail, PPOConfig(), ["--help"])
    assert "--generation-layout.tp" in capsys.readouterr().out
    seen = []
    run_stage(lambda config: seen.append(config), PPOConfig(), ["--generation-layout.tp", "2"])
    assert seen[0].generation_layout == ParallelLayout(tp=2)


def test_unknown_option_is_an_error_that_names_it_and_the_near_one(capsys):
    message = fails_with(capsys, ["--data.skip-bad-line"])
    assert "Unrecognized options: --data.skip-bad-line\n" in message
    assert "perhaps you meant --data.skip-bad-lines" in message


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--lr", "fast"], "'fast'"),
        (["--lr"], "'--lr'"),
        (["--mode", "other"], "'fixed', 'adaptive'"),
        (["lr=3"], "lr=3"),
        (["--steps", "0"], "steps 0 must be at least 1"),
    ],
)
def test_bad_option_is_one_error_that_names_the_cause(capsys, arguments, cause):
    assert cause in fails_with(capsys, arguments)


def test_user_error_of_the_run_is_printed_without_a_traceback(capsys):
    def train(config: StageConfig) -> None:
        raise UserError("data.jsonl:3: no field 'prompt'")

    assert fails_with(capsys, [], train) == "error: data.jsonl:3: no field 'prompt'\n"


def test_other_errors_keep_their_traceback():
    def train(config: StageConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage(train, StageConfig(), [])


def test_ranks_above_zero_wait_for_rank_zero_to_speak(capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("engine.recipe.time.sleep", waits.append)

    def train(config: StageConfig) -> None:
        raise UserError("no such file")

    with pytest.raises(SystemExit):
        run_stage(train, StageConfig(), [])
    assert waits == [5.0]
    assert capsys.readouterr().err == "[rank 3] error: no such file\n"


@pytest.mark.parametrize("name", ["", "config.json"])
def test_options_lie_over_a_saved_config(tmp_path, name):
    save_config(StageConfig(steps=7, lr=2.0), tmp_path / "config.json")
    seen = []
    arguments = ["--lr", "3", "--config", str(tmp_path / name)]
    run_stage(seen.append, StageConfig(mode="adaptive"), arguments)
    assert seen == [StageConfig(steps=7, lr=3.0)]


def test_saved_config_of_another_stage_is_an_error(capsys, tmp_path):
    save_config(DataConfig(), tmp_path / "config.json")
    message = fails_with(capsys, ["--config", str(tmp_path)])
    assert f"{tmp_path / 'config.json'}: unknown field path" in message
    assert "no such file" in fails_with(capsys, ["--config", str(tmp_path / "nowhere")])


def test_help_exits_zero_and_shows_options_with_hyphens(capsys):
    with pytest.raises(SystemExit) as stop:
        run_stage(lambda config: None, StageConfig(), ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "--data.skip-bad-lines" in text
    assert "Peak learning rate." in text


def help_of(recipe: str, *, then: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} {ROOT / 'recipes' / recipe} --help{then}"
    return subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_of_a_field_is_one_paragraph_whatever_its_docstring_wraps_at():
    text = help_of("ppo_tiny.py").stdout
    assert "it and the KL is measured to it. (default: runs/init_tiny)" in text


def test_help_ends_quietly_when_its_reader_leaves():
    done = help_of("ppo_tiny.py", then=" | head -1")
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


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
        ("[1]", "the file cannot be [1]"),
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


def test_config_imports_neither_torch_nor_megatron():
    code = "import sys, engine.recipe; print({'torch', 'megatron'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "set()\n", answer.stderr


@dataclass(frozen=True, kw_only=True)
class Numbers:
    steps: int = 3
    rate: float = 0.5
    floor: int = 0
    share: float | None = 0.25

    def __post_init__(self) -> None:
        check_numbers(
            self, "data.", counts="steps", positive="rate", not_negative="floor", shares="share"
        )


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"steps": 0}, r"data\.steps must be at least 1, got 0"),
        ({"rate": 0.0}, r"data\.rate must be positive, got 0\.0"),
        ({"rate": -1.0}, r"data\.rate must be positive, got -1\.0"),
        ({"rate": math.nan}, r"data\.rate must be positive, got nan"),
        ({"rate": math.inf}, r"data\.rate must be finite, got inf"),
        ({"floor": -1}, r"data\.floor must be at least 0, got -1"),
        ({"share": 1.01}, r"data\.share must be from 0 to 1, got 1\.01"),
        ({"share": -0.1}, r"data\.share must be from 0 to 1, got -0\.1"),
    ],
)
def test_numbers_outside_their_limits_are_errors(change, cause):
    with pytest.raises(UserError, match=cause):
        Numbers(**change)


def test_numbers_at_their_limits_and_absent_ones_are_silent():
    for share in (0.0, 1.0, None):
        Numbers(steps=1, rate=1e-30, share=share)
