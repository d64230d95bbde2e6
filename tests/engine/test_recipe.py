import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.ranks import failure
from engine.recipe import run_stage
from engine.settings.layout import ParallelLayout
from engine.settings.saved import save_config
from engine.settings.sft import SFTConfig
from engine.settings.waiting import WaitingConfig
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
        (OSError(errno.EDQUOT, "x", "/a"), f"/a: {os.strerror(errno.EDQUOT)}"),
        (OSError(errno.ENFILE, "x"), f"the system: {os.strerror(errno.ENFILE)}"),
        (PermissionError(errno.EPERM, "x", "/a"), f"/a: {os.strerror(errno.EPERM)}"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/nowhere/at/all"),
            "/nowhere/at/all: Stale file handle; its folder was moved or removed meanwhile",
        ),
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
        MemoryError(),
        ImportError("libtorch.so: failed to map segment from shared object"),
        ImportError("libgomp.so: Cannot allocate memory in static TLS block"),
    ],
)
@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 3_000_000_000])
def test_memory_that_a_limit_keeps_back_is_one_line(limit: int, error, capsys, monkeypatch):
    def train(config: StageConfig) -> None:
        monkeypatch.setattr("engine.recipe.resource.getrlimit", lambda number: (limit, limit))
        raise error

    if limit == resource.RLIM_INFINITY:  # what there is does not suffice: where was it wanted?
        with pytest.raises(type(error)):
            run_stage(train, StageConfig(), [])
        return
    line = "no more memory: this process may have 3.0 GB (ulimit -v); raise that"
    assert fails_with(capsys, [], train) == f"error: {line}\n"


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "0"), ("RANK", "one")])
def test_a_launch_that_is_none_is_said_before_anything_else(name, value, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert fails_with(capsys, ["--no-such-option"], pytest.fail).startswith(f"error: {name} ")


def test_a_stage_runs_as_its_settings_have_the_launcher_watched_and_the_libraries_prepared(
    tmp_path, monkeypatch
):
    seen: list[object] = []

    @contextlib.contextmanager
    def watching(seconds: float):
        seen.append(seconds)
        yield
        seen.append("over")

    monkeypatch.setattr("engine.recipe.watching_launcher", watching)
    monkeypatch.setattr("engine.recipe.prepare_libraries", lambda *found: seen.append(found))
    config = SFTConfig(
        directory=tmp_path,
        layout=ParallelLayout(tp=4),
        waiting=WaitingConfig(orphan_seconds=7.0),
    )
    run_stage(lambda config: seen.append("runs"), config, [])
    assert seen == [7.0, (4, tmp_path), "runs", "over"]


def test_an_interrupt_that_nobody_notes_has_the_shells_status_and_no_words(capsys):
    def train(config: StageConfig) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_stage(train, StageConfig(), [], has_dry_run=False)
    assert ended.value.code == 130
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # once the recipe is over
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such file"), 2, "error: no such file"),
        (ZeroDivisionError("of ours"), 1, "ZeroDivisionError: of ours"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, None),
    ],
)
def test_others_and_torchrun_hear_why_a_rank_fails(
    error: Exception, status: int, line: str | None, tmp_path, monkeypatch
):
    heard: list[tuple[str, int, str]] = []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told"))
    monkeypatch.setattr(failure, "await_verdict", lambda error: heard.append(("waits", 0, "")))
    monkeypatch.setattr(failure, "tell_others", lambda *words: heard.append((*words, "")[:3]))

    def train(config: StageConfig) -> None:
        raise error

    with pytest.raises((SystemExit, type(error))):
        run_stage(train, StageConfig(), [])
    line = line or "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    said, code, text = heard[-1]
    assert (said, code) == (line, status)
    assert json.loads((tmp_path / "told").read_text())["message"]["message"] == line
    if status == 1:  # which may be another rank's fault
        assert heard[0] == ("waits", 0, "")
        assert text.startswith("Traceback")


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
