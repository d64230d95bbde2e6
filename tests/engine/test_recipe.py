import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.recipe import run_stage
from engine.settings.saved import save_config
from tests.engine.settings.small_stage import DataConfig, StageConfig, fails_with
from tests.hostile import EVERYTHING, dangers

ROOT = Path(__file__).parents[2]

LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
TOO_MANY = f"Too many open files: this process may have {LIMIT} (ulimit -n); raise that"


def test_user_error_of_the_run_is_printed_without_a_traceback(capsys):
    def train(config: StageConfig) -> None:
        raise UserError("data.jsonl:3: no field 'prompt'")

    assert fails_with(capsys, [], train) == "error: data.jsonl:3: no field 'prompt'\n"


def test_other_errors_keep_their_traceback():
    def train(config: StageConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage(train, StageConfig(), [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), f"the system: {TOO_MANY}"),
        (
            RuntimeError("[enforce fail at loop.cc:48] pipe: Too many open files\nframe 1"),
            f"{TOO_MANY} ([enforce fail at loop.cc:48] pipe: Too many open files)",
        ),
        (
            RuntimeError("disk: No space left on device"),
            "No space left on device (disk: No space left on device)",
        ),
        (OSError(errno.EFBIG, "File too large", "b"), "b: File too large"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/at/all"),
            "/nowhere/at/all: No such file or directory; its folder was moved or removed meanwhile",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line_wherever_it_is_met(error, line, capsys):
    def train(config: StageConfig) -> None:
        raise error

    assert fails_with(capsys, [], train) == f"error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a-wrong-name-of-ours"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of no file
        OSError(errno.EINVAL, "Invalid argument", "/a"),
        OSError("no number"),
        RuntimeError("size mismatch"),
        ValueError("Too many open files"),  # none of torch's
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_other_errors_of_the_system_keep_their_traceback(error):
    def train(config: StageConfig) -> None:
        raise error

    with pytest.raises(type(error)) as kept:
        run_stage(train, StageConfig(), [])
    assert kept.value is error


def test_ranks_above_zero_wait_for_rank_zero_to_speak(capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
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


def test_config_imports_neither_torch_nor_megatron():
    code = "import sys, engine.recipe; print({'torch', 'megatron'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "set()\n", answer.stderr


def test_an_error_holds_no_command_to_the_terminal_and_has_a_length(capsys):
    def train(config: StageConfig) -> None:
        raise UserError(f"first {EVERYTHING} {'key ' * 1_000_000} last")

    error = fails_with(capsys, [], train)
    assert dangers(error) == []
    assert error.startswith("error: first \\x1b]52;")
    assert error.endswith(" last\n")
    assert len(error) <= 4001


RUN = """
import sys
sys.path.insert(0, {root!r})
from engine.errors import UserError
from engine.recipe import run_stage
from tests.engine.settings.small_stage import StageConfig
def train(config):
    print("read: \u65e5")
    raise {kind}({text!r})
run_stage(train, StageConfig(), {arguments!r})
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("kind", ["ValueError", "UserError", "KeyError"])
def test_nothing_raw_comes_out_of_a_process_whatever_its_encoding(kind, encoding, tmp_path):
    code = RUN.format(root=str(ROOT), kind=kind, text=f"\u65e5 {EVERYTHING}", arguments=[])
    told = tmp_path / "told.json"
    environment = os.environ | {
        "PYTHONIOENCODING": encoding,
        "TORCHELASTIC_ERROR_FILE": str(told),
    }
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert answer.returncode == (2 if kind == "UserError" else 1)
    assert dangers(answer.stderr.decode(encoding)) == []
    assert b"UnicodeEncodeError" not in answer.stderr
    last = answer.stderr.decode(encoding).splitlines()[-1]
    assert "]52;c;T1dORUQ=" in last
    said = json.loads(told.read_text())["message"]["message"]
    assert dangers(said) == []
    assert last.partition(" ")[0] == said.partition(" ")[0]


def test_an_option_that_is_not_there_is_named_printably(capsys):
    error = fails_with(capsys, [f"--lr\x1b[2J{chr(0x202E)}", "3"])
    assert dangers(error) == []
