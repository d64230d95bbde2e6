import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.recipe import run_stage
from engine.settings.command_line import as_options, parse_config
from engine.settings.layout import ParallelLayout
from engine.settings.ppo import PPOConfig
from engine.settings.saved import changed_fields, save_config
from engine.settings.tokenizer import TokenizerConfig
from tests.engine.settings.small_stage import DataConfig, Rule, StageConfig, fails_with

ROOT = Path(__file__).parents[3]


def test_options_replace_fields_of_the_default():
    seen = []
    arguments = ["--data.skip-bad-lines", "--data.path", "a/b", "--lr", "2", "--mode", "adaptive"]
    run_stage(seen.append, StageConfig(steps=7), arguments)
    data = DataConfig(path=Path("a/b"), skip_bad_lines=True)
    assert seen == [StageConfig(steps=7, data=data, lr=2.0, mode="adaptive")]


def test_no_option_leaves_the_default():
    assert parse_config(StageConfig(steps=7), []) == StageConfig(steps=7)


def test_home_is_meant_by_a_tilde_before_any_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--data.prompts=~/a.jsonl@2,~/b,c~", "--policy", "~", "--directory=x/~"]
    found = parse_config(PPOConfig(), words)
    assert str(found.data.prompts) == "/home/me/a.jsonl@2,/home/me/b,c~"
    assert (found.policy, found.directory) == (Path("/home/me"), Path("x/~"))
    files = parse_config(TokenizerConfig(), ["--files", "~/a", "b"]).files
    assert files == (Path("/home/me/a"), Path("b"))


@pytest.mark.parametrize(
    "path", [None, "a b", "it's", "-x", "tab\there, it's \\t", "naïve\n", "$HOME"]
)
def test_values_as_options_are_those_values_again_through_a_shell(path, tmp_path):
    wanted = StageConfig(
        data=DataConfig(path=path and Path(path), skip_bad_lines=path is None),
        lr=1e-7,
        mode="adaptive",
        rule=Rule.replace,
        betas=(0.5, 0.25),
        seeds=() if path is None else (1, 2),
    )
    given = StageConfig(
        data=DataConfig(path=Path("z"), skip_bad_lines=path is not None), seeds=(3,)
    )
    save_config(wanted, tmp_path / "c.json")
    changed = changed_fields(given, tmp_path / "c.json")
    options = as_options(given, {name: saved for name, (saved, _) in changed.items()})
    assert options.isprintable()
    command = ["bash", "-c", f"printf '%s\\0' {options}"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    assert parse_config(given, words[:-1]) == wanted


def test_a_flag_that_is_wanted_or_not_has_a_name_where_the_value_may_be_none_too():
    values = {"numerics.deterministic": False, "reference": None, "data.skip_bad_lines": True}
    options = as_options(PPOConfig(), values)
    assert "--reference None --data.skip-bad-lines" in options
    assert parse_config(PPOConfig(), options.split()).numerics.deterministic is False


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
        (["--steps", "9" * 30], "steps must be within 2^62, got 999"),
        (["--steps", "9" * 5000], "--steps"),
        (["--lr", "nan"], "lr must be finite, got nan"),
        (["--data.path", "a\udcff"], "data.path must be valid UTF-8, got 'a\\udcff'"),
        (
            ["--data.path", "a\0b"],
            "data.path must be a path, of at most 3072 bytes and without NULs",
        ),
        (["--data.path", "b" * 10_000], "data.path must be a path"),
        (["--config", "b" * 10_000], "config must be a path"),
        (["--\udcff", "\ud800"], "Unrecognized options: --\\udcff, \\ud800"),
        (["--" + "x" * 50_000], "Unrecognized options: --xxx"),
        (["--mode", "x" * 50_000], "invalid choice"),
        (["--dry-run", "9" * 5000], "--dry-run takes a number of GPUs"),
        (["[/bold]"], "[/bold]"),
        (["--config", "/proc/self/mem"], "/proc/self/mem"),
        (["--config", "/dev/zero"], "/dev/zero is no regular file"),
    ],
)
def test_bad_option_is_one_error_that_names_the_cause(capsys, arguments, cause):
    message = fails_with(capsys, arguments)
    assert cause in message
    assert len(message) < 1500


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
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_of_a_field_is_one_paragraph_whatever_its_docstring_wraps_at():
    lines = [line.strip("│ ") for line in help_of("ppo_tiny.py").stdout.splitlines()]
    start = lines.index("--policy PATH") + 1
    assert lines[start : start + 2] == [  # in 66 columns, where its docstring has 100
        "Run or checkpoint of the RLHF initialisation, or a Hugging Face",
        "folder: the policy starts from it and the KL is measured to it.",
    ]


def test_help_ends_quietly_when_its_reader_leaves():
    done = help_of("ppo_tiny.py", then=" | head -1")
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--data.path", "a.jsonl", "b.jsonl"], "a.jsonl,b.jsonl"),
        (["--data.path=a.jsonl", "b.jsonl"], "a.jsonl,b.jsonl"),
        (["--data.path", "a.jsonl,", "b.jsonl", "c d"], "'a.jsonl,b.jsonl,c d'"),
    ],
)
def test_a_second_file_is_told_of_commas(words, joined, capsys):
    wanted = f"--data.path takes one value: files are joined by commas, --data.path {joined};"
    for after in ([], ["--lr", "2"]):
        assert wanted in fails_with(capsys, [*words, *after])


def test_a_second_number_or_a_word_without_an_option_is_not(capsys):
    others = (["--lr", "2", "a.jsonl"], ["a.jsonl"], ["--data.skip-bad-lines", "a"])
    for words in (["--lr", "2", "3"], *others):
        assert "commas" not in fails_with(capsys, words)
