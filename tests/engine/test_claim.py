import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import claim as module
from engine.claim import UNFINISHED, check_claim, claim, holding_claims
from engine.errors import UserError
from engine.metrics import read_metrics

ROOT = Path(__file__).parents[2]

# Claims the folder it is given, says so, and waits for its end.
HOLDER = """
import sys, time
from pathlib import Path
from engine.claim import claim, holding_claims
with holding_claims():
    claim(Path(sys.argv[1]))
    print("held", flush=True)
    {then}
"""


def hold(folder: Path, then: str = "time.sleep(600)") -> subprocess.Popen[str]:
    """Start a process that holds a folder, and return it once it does."""
    code = HOLDER.format(then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_in_a_line_that_says_who_is_there(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with holding_claims(), pytest.raises(UserError) as refused:
            claim(tmp_path)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path}: another run writes into this folder: ")
        assert f"process {holder.pid} on " in said and f"-c {tmp_path}; wait for it" in said
        assert "\n" not in said
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_refuses_nobody(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with holding_claims():
        claim(tmp_path)
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    then = "import os; print(os.fork() or 'child', flush=True); time.sleep(600)"
    holder = hold(tmp_path, then)
    assert holder.stdout is not None
    child = int("".join(holder.stdout.readline() + holder.stdout.readline()).replace("child", ""))
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with holding_claims():
            claim(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_program_that_takes_the_place_of_its_process_claims_again(tmp_path: Path) -> None:
    code = HOLDER.format(then="pass").replace('"held"', '"again"')
    again = f"import os; os.execv(sys.executable, [sys.executable, '-c', {code!r}, sys.argv[1]])"
    holder = hold(tmp_path, again)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "again\n"
    assert holder.wait() == 0


def test_a_claim_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sft"
    for _ in range(2):  # of one process
        with pytest.raises(ZeroDivisionError), holding_claims():
            claim(folder)
            claim(folder)
            assert (folder / ".lock").exists()
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []
    with holding_claims():
        claim(folder)
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_what_is_unfinished_goes_with_the_claim(tmp_path: Path) -> None:
    unfinished = tmp_path / "run" / UNFINISHED
    with holding_claims():
        claim(tmp_path / "run")
        (unfinished / "reference").mkdir(parents=True)
    assert not (tmp_path / "run").exists()
    (unfinished / "reference").mkdir(parents=True)  # of one that was killed
    (tmp_path / "run" / "metrics.jsonl").touch()
    with holding_claims():
        claim(tmp_path / "run")
        assert unfinished.exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_an_inner_block_keeps_what_the_outer_one_claimed(tmp_path: Path) -> None:
    with holding_claims():
        claim(tmp_path)
        with holding_claims():
            claim(tmp_path)
            claim(tmp_path / "sft")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken_for_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = module._lock, []

    def take(number: int, folder: Path, path: Path) -> bool:
        if not taken:
            path.unlink()  # as the holder does, between our opening and our locking of it
        taken.append(number)
        return lock(number, folder, path)

    monkeypatch.setattr(module, "_lock", take)
    with holding_claims():
        claim(tmp_path)
        assert len(taken) == 2
        assert (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_told_of_and_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):

        def flock(descriptor: int, operation: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module.fcntl, "flock", flock)
        with holding_claims():
            claim(tmp_path)
            (tmp_path / ".lock").write_text("of a second run")
            check_claim(tmp_path)
        assert f"WARNING: {tmp_path}: its file system has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("words", [b"", b"\0" * 99, b'{"pid": 1}', b"[" * 9000, b"[1]", b"\xff"])
def test_a_lock_that_says_nothing_refuses_all_the_same(tmp_path: Path, words: bytes) -> None:
    then = f"open(sys.argv[1] + '/.lock', 'wb').write({words!r}); print('said', flush=True)"
    holder = hold(tmp_path, f"{then}; time.sleep(600)")
    assert holder.stdout is not None and holder.stdout.readline() == "said\n"
    try:
        with holding_claims(), pytest.raises(UserError, match="its process has not said who it is"):
            claim(tmp_path)
    finally:
        holder.kill()
        holder.wait()


def test_what_a_lock_says_is_shown_on_one_line(tmp_path: Path) -> None:
    words = {"pid": 1, "node": "n", "started": "now", "command": "a\x1b]52;c;\x07\nb" + "c" * 4000}
    (tmp_path / "x").write_text(json.dumps(words))
    said = module._holder(tmp_path / "x")
    assert said.isprintable() and len(said) < 300


def test_what_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("as it was")
    for name, make, said in (
        ("link", lambda path: path.symlink_to(target), "Too many levels of symbolic links"),
        ("pipe", os.mkfifo, "is no regular file; remove it"),
        ("folder", Path.mkdir, "Is a directory"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / ".lock")  # type: ignore[operator]
        with holding_claims(), pytest.raises(UserError, match=rf"\.lock.*{said}"):
            claim(folder)
    assert target.read_text() == "as it was"
    with holding_claims(), pytest.raises(UserError, match="cannot be written: Not a directory"):
        claim(target / "run")


def test_a_full_disk_is_seen_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "pwrite", pwrite)
    with holding_claims(), pytest.raises(UserError, match=r"\.lock: cannot be written: No space"):
        claim(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_moved_or_removed_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_claim(folder)  # of nobody's
    with holding_claims():
        claim(folder)
        check_claim(folder)
        (folder / ".lock").unlink()
        check_claim(folder)  # somebody tidies
        folder.rename(tmp_path / "old")
        with pytest.raises(UserError, match="the folder was removed while a run wrote into it"):
            check_claim(folder)
        holder = hold(folder)
        try:
            with pytest.raises(UserError, match=f"is another's now: process {holder.pid}"):
                check_claim(folder)
        finally:
            holder.kill()
            holder.wait()
    assert (folder / ".lock").exists()  # not ours to remove


def test_of_many_at_once_one_holds(tmp_path: Path) -> None:
    code = HOLDER.format(then="time.sleep(600)")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    while len(living := [p for p in processes if p.poll() is None]) > 1:
        time.sleep(0.05)
    for process in living:
        process.kill()
    said = [process.communicate() for process in processes]
    assert len(living) == 1
    assert [out for out, _ in said if out] == ["held\n"]
    refused = [error.splitlines()[-1] for out, error in said if not out]
    assert all("another run writes into this folder" in line for line in refused)


@pytest.mark.slow  # starts a recipe three times
def test_of_two_real_runs_one_is_refused_and_a_killed_one_is_continued(
    tiny: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, str(ROOT / "recipes" / "sft_tiny.py"), "--epochs", "40"),
        *("--directory", str(tmp_path / "run"), "--init-from", str(tiny / "policy")),
        *("--data.train", str(tiny / "demonstrations.jsonl"), "--save-every", "5"),
    ]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    try:
        while " 7/" not in first.stdout.readline():
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)  # it would be through before the second begins
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert second.returncode == 2
        [line] = second.stderr.splitlines()
        assert f"another run writes into this folder: process {first.pid} on" in line
    finally:
        first.kill()
        first.wait()
    third = subprocess.run([*command, "--epochs", "6"], capture_output=True, text=True, cwd=ROOT)
    assert third.returncode == 0, third.stderr
    steps = [row["step"] for row in read_metrics(tmp_path / "run")]
    assert steps == list(range(len(steps))) and len(steps) > 7
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert not (tmp_path / "run" / ".lock").exists()
