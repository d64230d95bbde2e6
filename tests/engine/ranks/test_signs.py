"""What a rank's main thread is at, and its stacks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.ranks import signs
from engine.ranks.signs import (
    come_further,
    end_training,
    in_phase,
    keep_stacks_in,
    own_signs,
    reach_step,
    signs_of,
    write_stacks,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signs, "_mine", signs.Signs())
    monkeypatch.setattr(signs, "_folder", None)
    monkeypatch.setattr(signs, "_is_written", threading.Lock())


def test_phases_nest_and_every_step_is_a_sign():
    assert own_signs().where() == "phase start"
    reach_step(3)
    with in_phase("rollout", is_bounded=True):
        count = own_signs().count
        come_further()
        assert own_signs().count == count + 1
        with in_phase("files", is_bounded=False):
            assert (own_signs().phase, own_signs().is_bounded) == ("files", False)
        assert own_signs().where() == "phase rollout, after step 3"
    assert signs_of(own_signs().text()) == own_signs()
    assert own_signs().is_bounded
    end_training()
    assert not own_signs().is_bounded


def test_a_phase_that_begins_or_ends_and_a_step_are_progress():
    counts = [own_signs().count]
    with in_phase("rollout", is_bounded=True):
        counts.append(own_signs().count)
    counts.append(own_signs().count)
    reach_step(1)
    counts.append(own_signs().count)
    end_training()
    counts.append(own_signs().count)
    assert counts == sorted(set(counts))


def test_a_phase_that_fails_is_left():
    with pytest.raises(ZeroDivisionError), in_phase("rollout", is_bounded=True):
        raise ZeroDivisionError
    assert own_signs().phase == "start"


def test_stacks_are_written_into_the_runs_folder_once(tmp_path: Path):
    keep_stacks_in(tmp_path)
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_2.txt").write_text("of the run before\n" * 10_000)
    with in_phase("score", is_bounded=True):
        assert str(tmp_path / "stacks") in write_stacks(2)
    text = (tmp_path / "stacks" / "rank_2.txt").read_text()
    assert text.startswith("rank 2, phase score, ")
    assert "of the run before" not in text
    assert "test_stacks_are_written_into_the_runs_folder_once" in text
    (tmp_path / "stacks" / "rank_2.txt").unlink()
    write_stacks(2)
    assert not (tmp_path / "stacks" / "rank_2.txt").exists()


def test_stacks_do_not_follow_a_link(tmp_path: Path):
    keep_stacks_in(tmp_path)
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_0.txt").symlink_to(tmp_path / "elsewhere")
    assert write_stacks(0).startswith("nowhere")
    assert not (tmp_path / "elsewhere").exists()


STUCK = """
import re
from engine.ranks.signs import end_where_stuck_for
end_where_stuck_for({seconds})
{again}
re.match(r'(a+)+b', 'a' * {length})
"""


@pytest.mark.parametrize(
    ("again", "length", "status"),
    [
        ("", 40, 1),  # for hours, with Python's lock held
        ("end_where_stuck_for(0)\nimport time\ntime.sleep(0.8)", 5, 0),
        ("import sys\nsys.stderr = None\nend_where_stuck_for(9)", 5, 0),  # nobody would read it
    ],
)
def test_a_process_that_holds_pythons_lock_ends_with_its_stacks(
    again: str, length: int, status: int
):
    answer = subprocess.run(
        [sys.executable, "-c", STUCK.format(seconds=0.5, again=again, length=length)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == status
    assert ("most recent call first" in answer.stderr) == (status == 1)


def test_stacks_without_a_folder_go_to_stderr_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with capfd.disabled(), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert write_stacks(0).startswith("nowhere: ")
    monkeypatch.setattr(signs, "_is_written", threading.Lock())
    assert write_stacks(0) == "on stderr"
    assert "most recent call first" in capfd.readouterr().err
