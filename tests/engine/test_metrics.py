import errno
import functools
import io
import json
import math
import os
import resource
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import metrics as metrics_file
from engine.alarms import Alarm
from engine.claim import claim, holding_claims
from engine.errors import UserError
from engine.metrics import Metrics, plot_curves, read_metrics
from engine.printable import open_console
from tests.hostile import EVERYTHING, dangers


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run_dir, steps, first_step=0, num_steps=10, **options) -> None:
    with Metrics(
        run_dir, is_writer=True, first_step=first_step, num_steps=num_steps, **options
    ) as metrics:
        for step in steps:
            metrics.log(step, {"train/loss": 2.0 - 0.1 * step})


def test_file_screen_and_tensorboard_say_the_same(tmp_path, capsys):
    logged(tmp_path / "sft", range(3))
    rows = [{"step": s, "train/loss": pytest.approx(2.0 - 0.1 * s)} for s in range(3)]
    assert read_metrics(tmp_path / "sft") == rows
    screen = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in screen] == [
        ["sft 1/10", "train/loss 2"],
        ["sft 2/10", "train/loss 1.9"],
        ["sft 3/10", "train/loss 1.8"],
    ]
    board = EventAccumulator(str(tmp_path / "sft" / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [0, 1, 2]
    assert [e.value for e in board.Scalars("train/loss")] == pytest.approx([2.0, 1.9, 1.8])


def test_run_that_is_set_back_shows_its_steps_once_and_keeps_its_alarms(tmp_path):
    with Metrics(tmp_path, is_writer=True, num_steps=9) as metrics:
        for step in (0, 1, 2, 3):
            metrics.log(step, {"train/loss": float(step)})
            metrics.log_samples(step, [{"prompt": str(step)}])
            metrics.log_alarms(step, [Alarm("spike", f"at {step}")])
        metrics.set_back(2)
        metrics.log(2, {"train/loss": 20.0})
        metrics.log_alarms(2, [Alarm("rewind", "to 2")])
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == expected
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == expected
    samples = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 1]
    alarms = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in alarms] == [0, 1, 2, 3, 2]


def test_tensorboard_shows_the_steps_of_a_resume_once(tmp_path):
    logged(tmp_path, range(6))
    logged(tmp_path, range(4, 8), first_step=4)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(8))


def test_the_line_shows_the_headline_in_its_order(tmp_path, capsys):
    headline = ("b/y", "absent", "a/x")
    with Metrics(tmp_path / "ppo", is_writer=True, num_steps=2, headline=headline) as metrics:
        metrics.log(0, {"a/x": 1.0, "b/y": 2.0, "c/z": 3.0})
    assert "ppo 1/2  b/y 2  a/x 1  eta 0:0" in capsys.readouterr().out


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    metrics = Metrics(tmp_path, is_writer=True, num_steps=2)
    metrics.log(0, {"train/loss": 1.0})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 0, "train/loss": 1.0}]
    metrics.close()


def test_resume_replaces_the_steps_that_it_repeats(tmp_path):
    logged(tmp_path, range(6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # killed while writing
    logged(tmp_path, range(4, 8), first_step=4)
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == list(range(8))


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    logged(tmp_path, range(6))
    logged(tmp_path, range(2))
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [0, 1]


def test_phase_seconds_are_summed_and_logged_once(tmp_path):
    with Metrics(tmp_path, is_writer=True, num_steps=2) as metrics:
        for _ in range(2):
            with metrics.phase("rollout"):
                time.sleep(0.02)
        assert 0.04 <= metrics.phase_seconds["rollout"] < 1.0
        metrics.log(0, {})
        metrics.log(1, {"train/loss": 1.0})
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert 0.04 <= first["rollout/seconds"] < 1.0
    assert "rollout/seconds" not in second


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with Metrics(tmp_path, is_writer=True, num_steps=1) as metrics:
        metrics.log(0, {"a/nan": math.nan, "a/inf": math.inf, "a/one": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["a/nan"] is None
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a/nan"])
    assert row["a/one"] == 1.0


def test_lines_of_one_step_are_read_as_one_row(tmp_path):
    with Metrics(tmp_path, is_writer=True, num_steps=1) as metrics:
        metrics.log(0, {"train/loss": 1.0})
        metrics.log(0, {"valid/loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 0, "train/loss": 1.0, "valid/loss": 2.0}]


def test_samples_go_to_a_file_and_a_table_with_brackets_as_they_are(tmp_path, capsys):
    with Metrics(tmp_path, is_writer=True, num_steps=1) as metrics:
        metrics.log_samples(0, [{"prompt": "[red]hello[red]", "score": 0.12345}])
        metrics.log_samples(0, [])
    expected = [{"step": 0, "prompt": "[red]hello[red]", "score": 0.12345}]
    assert lines_of(tmp_path / "samples.jsonl") == expected
    screen = capsys.readouterr().out
    assert "[red]hello[red]" in screen
    assert "0.1235" in screen


def test_alarms_go_to_a_file_and_the_screen(tmp_path, capsys):
    with Metrics(tmp_path, is_writer=True, num_steps=1) as metrics:
        metrics.log_alarms(3, [Alarm("pad_leak", "look at the mask")])
    expected = [{"step": 3, "name": "pad_leak", "message": "look at the mask"}]
    assert lines_of(tmp_path / "alarms.jsonl") == expected
    assert "ALARM pad_leak: look at the mask" in capsys.readouterr().out


def test_a_run_that_is_through_has_no_cautions(tmp_path, capsys):
    for first_step in (2, 1):
        with Metrics(tmp_path, is_writer=True, num_steps=2, first_step=first_step) as metrics:
            metrics.note("what was read", cautions=[Alarm("warmup", "too long")])
        said = capsys.readouterr().out
        assert "what was read" in said
        assert ("WARNING warmup" in said) == (first_step == 1)
        assert (tmp_path / "alarms.jsonl").exists() == (first_step == 1)


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with Metrics(run_dir, is_writer=False, num_steps=1) as metrics:
        with metrics.phase("update"):
            pass
        metrics.log(0, {"train/loss": 1.0})
        metrics.log_samples(0, [{"prompt": "x"}])
        metrics.log_alarms(0, [Alarm("a", "b")])
        assert metrics.phase_seconds == {}
    assert not run_dir.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"\0" * 40, b"", b"[1]", b"null", b"[" * 99_999, b"9" * 5000),
        *(b'{"step": 1.0}', b'{"step": true}', b'{"step": -1}', b'{"step": "1"}'),
        *(b'{"step": 1, "train/lo\xf3s": 1.9}', b'{"stfp": 1, "train/loss": 1.9}'),
        *(b'{"step": 1, "train/loss": "1"}', b'{"step": 1, "train/loss": [1]}'),
        b'{"step": 1, "train/loss": ' + b"9" * 400 + b"}",
    ],
)
def test_a_damaged_line_is_set_aside_and_said(tmp_path, capsys, damaged):
    logged(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damaged + b"\n" + lines[2])
    capsys.readouterr()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 2]
    assert capsys.readouterr().err == f"WARNING: {path}: 1 damaged lines are left out\n"
    assert plot_curves(tmp_path) is not None
    capsys.readouterr()
    logged(tmp_path, [3], first_step=3)
    said = f"WARNING: {path}: 1 damaged lines are now in metrics.jsonl.damaged\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged + b"\n"
    assert [row["step"] for row in lines_of(path)] == [0, 2, 3]
    logged(tmp_path, [4], first_step=4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["samples", "alarms"])
def test_damaged_samples_and_alarms_end_no_run(tmp_path, capsys, name):
    good, path = b'{"step": 0, "text": "x"}\n', tmp_path / f"{name}.jsonl"
    path.write_bytes(good + b'{"step": 0, "text": "\xff"}\n' + b"\0\0\n" + good + b'{"step": 0')
    logged(tmp_path, [1], first_step=1)
    assert path.read_bytes() == good + good
    assert f"2 damaged lines are now in {name}.jsonl.damaged" in capsys.readouterr().err


def test_a_log_that_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "samples.jsonl")
    with pytest.raises(UserError, match="samples.jsonl is no regular file"):
        logged(tmp_path, [0])
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        read_metrics(tmp_path)


def refuse(monkeypatch, ending: str) -> None:
    """Have the system refuse to open, for writing, whatever ends so."""
    opened = Path.open

    def open_or_refuse(path, mode="r", *arguments, **options):
        if ending in path.name and mode != "r":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_refuse)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "alarms.jsonl", "tfevents"])
def test_a_full_disk_is_one_line_with_the_path(tmp_path, monkeypatch, name):
    refuse(monkeypatch, name)
    with (
        pytest.raises(UserError, match=f"{name}.*: cannot be written: No space left on device$"),
        Metrics(tmp_path, is_writer=True, num_steps=1) as metrics,
    ):
        metrics.log(0, {"train/loss": 1.0})
        metrics.log_samples(0, [{"prompt": "x"}])
        metrics.log_alarms(0, [Alarm("a", "b")])


def test_tensorboards_file_says_at_once_that_the_disk_is_full(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(UserError, match=r"tfevents.*: cannot be written: File too large"),
        Metrics(tmp_path, is_writer=True, num_steps=9) as metrics,
    ):
        metrics.log(0, {"train/loss": 1.0})
        [events] = (tmp_path / "tensorboard").iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 9, before[1]))
        try:
            metrics._events.add(1, {"train/loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_was_removed_ends_the_run_in_a_line(tmp_path):
    with (
        pytest.raises(UserError, match="run: the folder was removed while a run wrote into it"),
        holding_claims(),
    ):
        claim(tmp_path / "run")
        with Metrics(tmp_path / "run", is_writer=True, num_steps=9) as metrics:
            metrics.log(0, {"train/loss": 1.0})
            (tmp_path / "run").rename(tmp_path / "old")
            metrics.log(1, {"train/loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_curves_that_cannot_be_drawn_fail_no_run(tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, "curves.png")
    logged(tmp_path, range(3))
    said = f"WARNING: {tmp_path / 'curves.png'} is not drawn: {tmp_path / 'curves.png'}: cannot be"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(said) and line.endswith("No space left on device")


@pytest.mark.parametrize("broken", ["plot_curves", "_EventFile.close"])
def test_closing_never_hides_what_ended_the_run(tmp_path, monkeypatch, capsys, broken):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(ZeroDivisionError),
        Metrics(tmp_path, is_writer=True, num_steps=1),
    ):
        patch.setattr(f"engine.metrics.{broken}", fail)
        raise ZeroDivisionError
    assert "No space left on device" in capsys.readouterr().err


def test_every_run_leaves_its_curves(tmp_path):
    logged(tmp_path, range(3))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_line_has_no_curves(tmp_path):
    assert plot_curves(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_hostile_text_reaches_the_screen_escaped_and_the_files_as_it_is(tmp_path, capsys):
    name = "run[red]{x}\x1b]0;t\x07\u202e\n"
    with Metrics(tmp_path / name, is_writer=True, num_steps=2) as metrics:
        metrics.note(f"{EVERYTHING}: 3 records\nforged")
        metrics.log(0, {"train/loss": 1.0, EVERYTHING.replace("\x00", ""): 2.0})
        metrics.log_samples(0, [{"prompt": EVERYTHING, "response": "a\nb" + "\x1b" * 5000}])
        metrics.log_alarms(0, [Alarm("kl", EVERYTHING)])
    screen = capsys.readouterr().out
    assert dangers(screen) == []
    assert "run[red]{x}\\x1b]0;t\\x07\\u202e\\n 1/2" in screen
    assert "3 records\\nforged" in screen
    assert "characters ..." in screen.replace("\n", " ")
    (row,) = lines_of(tmp_path / name / "samples.jsonl")
    assert row["prompt"] == EVERYTHING
    assert row["response"] == "a\nb" + "\x1b" * 5000


def test_a_runs_name_is_no_markup_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        metrics_file,
        "open_console",
        lambda: open_console(force_terminal=True, width=120, color_system=None),
    )
    logged(tmp_path / "[red]{x}$\x1b[2J", range(1))
    screen = capsys.readouterr().out
    assert "[red]{x}$\\x1b[2J" in screen
    assert "\x1b[2J" not in screen


def test_a_terminals_lines_break_between_words(tmp_path, capsys, monkeypatch):
    values = {f"train/number_{n}": 12345.6 * n for n in range(6)}
    for name, width in (("terminal", 40), ("log", None)):
        with monkeypatch.context() as changed:
            if width is not None:
                console = functools.partial(
                    open_console, force_terminal=True, width=width, color_system=None
                )
                changed.setattr(metrics_file, "open_console", console)
            with Metrics(tmp_path / name, is_writer=True, num_steps=1) as metrics:
                metrics.log(0, values)
        screen = capsys.readouterr().out
        assert screen.split().count("61,728") == 1  # whole, on one of the lines
        num_lines = sum("number" in line for line in screen.splitlines())
        assert (num_lines > 3) == (width is not None)


def test_a_key_is_no_formula(tmp_path):
    with Metrics(tmp_path, is_writer=True, num_steps=1) as metrics:
        metrics.log(0, {"a/$\\frac{": 1.0, "b/\x1b[2J": 1.0, "c/$x$": 2.0})
    assert plot_curves(tmp_path).stat().st_size > 1000


def test_a_screen_of_any_encoding_takes_every_text(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with Metrics(tmp_path / "l\xe4uft", is_writer=True, num_steps=1) as metrics:
        metrics.note("\u65e5\u672c \u2026")
        metrics.log(0, {"train/loss": 1.0})
        metrics.log_samples(0, [{"prompt": "\u65e5" * 90, "response": "x" * 300}])
    raw.seek(0)
    assert "l\\xe4uft 1/1" in raw.read().decode("ascii")
