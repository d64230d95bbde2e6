"""What a rank says to the others, and what it does at what they say: one rank, in this process."""

import datetime
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine import stop
from engine.ranks import failure
from engine.ranks.failure import _KEY, _World
from engine.ranks.signs import Signs
from engine.ranks.silence import Watch
from engine.settings.waiting import WaitingConfig
from tests.recipe_runs import until


class Ended(BaseException):
    """Ends the process."""


class Stopped:
    """A store whose process is stopped: who asks it waits for ever."""

    def __getattr__(self, name: str) -> Any:
        pytest.fail("it was asked")


class Gone:
    """A store whose process is gone."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistError("Connection reset by peer")


END = failure._end


@pytest.fixture(autouse=True)
def stacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The ranks whose stacks were written; nothing that is waited for takes long."""
    written: list[int] = []

    def end(status: int) -> None:
        raise Ended(status)

    def write_stacks(rank: int) -> str:
        written.append(rank)
        return "in the run's folder"

    monkeypatch.setattr(failure, "_end", end)
    monkeypatch.setattr(failure, "write_stacks", write_stacks)
    monkeypatch.setattr(failure, "_world", None)
    for name in ("_HEARD_SECONDS", "_SILENT_SECONDS", "_LATER", "_PAUSE"):
        monkeypatch.setattr(failure, name, 0.02)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told"))
    return written


def world(rank: int, size: int = 2, store: Any = None, **changes: Any) -> _World:
    watch = Watch(world_size=size, silence_seconds=45.0, hang_seconds=0.0)
    if store is None:
        store = dist.HashStore()
        store.set_timeout(datetime.timedelta(seconds=2))  # for what nobody has said
    return _World(rank=rank, size=size, store=store, watch=watch, **changes)


def say(store: dist.Store, rank: int, status: int = 1, **flags: bool) -> None:
    """Have a rank say that it ends."""
    words = {"rank": rank, "message": "why", "status": status}
    defaults = {"has_failed": False, "wants_stacks": False}
    store.set(_KEY, json.dumps(words | defaults | flags))


def told_torchrun(tmp_path: Path) -> str:
    path = tmp_path / "told"
    return json.loads(path.read_text())["message"]["message"] if path.exists() else ""


@pytest.mark.parametrize(
    ("hears", "flags", "said"),
    [  # on stderr, to torchrun, and whose stacks
        (0, {"has_failed": True}, ("rank 2 failed: why\n", "rank 2 failed: why", [])),
        (1, {"has_failed": True}, ("", "rank 2 failed: why", [])),
        (0, {}, ("why\n", "why", [])),  # no failure: they leave
        (0, {"wants_stacks": True}, ("", "why", [0])),  # who says so has printed it
        (1, {"wants_stacks": True}, ("", "why", [1])),
    ],
)
def test_what_another_rank_says_ends_this_one(
    hears: int,
    flags: dict[str, bool],
    said: tuple[str, str, list[int]],
    stacks: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    mine = world(hears, size=3)
    say(mine.store, rank=2, status=7, **flags)
    with pytest.raises(Ended, match="7"):
        failure._hear(mine, mine.store)
    assert (capsys.readouterr().err, told_torchrun(tmp_path), stacks) == said


@pytest.mark.parametrize("why", ["its own words", "it has parted", "the first rank goes in order"])
def test_what_ends_no_rank(why: str):
    mine = world(1)
    if why == "the first rank goes in order":
        mine.store.set(_KEY, json.dumps({"rank": 0}))
    else:
        say(mine.store, rank=1 if why == "its own words" else 0)
    if why == "it has parted":
        mine.has_parted.set()
    failure._hear(mine, mine.store)


def test_the_last_rank_to_hear_says_that_all_have():
    store = dist.HashStore()
    say(store, rank=0)
    for rank in (1, 2):
        assert not store.check([f"{_KEY}/heard"])
        mine = world(rank, size=3, store=store)
        with pytest.raises(Ended):
            failure._hear(mine, store)
        failure._count(mine, store)  # as part() may, once more
    assert store.check([f"{_KEY}/heard"])


def test_the_first_rank_stays_with_the_store_until_that_is_over(monkeypatch: pytest.MonkeyPatch):
    waited: list[tuple[int, str]] = []
    for rank in (0, 1):
        mine = world(rank, size=3)
        say(mine.store, rank=2)
        monkeypatch.setattr(
            failure, "_wait_for", lambda key, store, seconds, rank=rank: waited.append((rank, key))
        )
        with pytest.raises(Ended):
            failure._hear(mine, mine.store)
    assert waited == [(0, f"{_KEY}/over")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_shows_its_text_and_is_the_first_or_not_heard(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    mine = world(rank)
    mine.store.set(f"{_KEY}/heard", "")  # by the other one
    monkeypatch.setattr(failure, "_world", mine)
    with pytest.raises(Ended, match="2"):
        failure.tell_others("error: why", 2, "a traceback")
    assert capsys.readouterr().err == "a traceback\n"
    said = json.loads(mine.store.get(_KEY))
    assert (said["rank"], said["status"], said["has_failed"]) == (rank, 2, True)
    assert mine.store.check([f"{_KEY}/over"])
    with pytest.raises(Ended, match="3"):
        failure.tell_others("error: because of it", 3)
    assert json.loads(mine.store.get(_KEY)) == said


@pytest.mark.parametrize(
    ("rank", "is_first", "out"), [(0, True, "why\n"), (1, True, ""), (0, False, "")]
)
def test_ranks_that_leave_together_say_so_once(
    rank: int,
    is_first: bool,
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    mine = world(rank)
    mine.store.set(f"{_KEY}/heard", "")  # by the other one
    monkeypatch.setattr(failure, "_world", mine)
    if not is_first:
        say(mine.store, rank=1)
    with pytest.raises(Ended, match="75"):
        failure.leave_all("why", 75)
    assert capsys.readouterr() == (out, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_parts_leaves_nobody_listening(rank: int, monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(failure, "end_where_stuck_for", limits.append)
    monkeypatch.setattr(failure, "_HEARD_SECONDS", 5.0)
    mine = world(rank)
    mine.store.set(f"{_KEY}/heard", "")  # the other one has
    mine.listener = threading.Thread(target=failure._hear, args=(mine, mine.store), daemon=True)
    mine.listener.start()
    until(lambda: limits, 10)
    assert mine.store.check([f"signs/{rank}"])
    monkeypatch.setattr(failure, "_world", mine)
    failure.part()
    assert limits == [90.0, 0]  # seconds in which it may hold Python's lock; then no more
    assert not mine.listener.is_alive()
    if rank == 0:
        assert json.loads(mine.store.get(_KEY)) == {"rank": 0}
    assert mine.store.check([f"{_KEY}/over"]) == (rank == 0)
    assert mine.store.check([f"{_KEY}/readers"]) == (rank == 1)


def looks(mine: _World, moments: tuple[float, ...], living: tuple[int, ...]) -> None:
    """Have a rank look at the others, of which some live."""
    for now in moments:
        for rank in living:
            mine.store.set(f"signs/{rank}", f"{now} {Signs(phase='train').text()}")
        failure._look(mine, mine.store, now)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_rank_that_never_gave_a_sign_is_missed(
    is_cut: bool, stacks: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = world(0, size=3)
    if is_cut:  # a connection broke, so that somebody is gone: less silence is enough
        mine.is_cut.set()
    looks(mine, (0.0, 14.0) if is_cut else (0.0, 16.0, 44.0), (0, 1))
    with pytest.raises(Ended, match="1"):
        looks(mine, (16.0,) if is_cut else (46.0,), (0, 1))
    said = capsys.readouterr().err
    assert "rank 2 of 3 gave no sign of life" in said
    assert told_torchrun(tmp_path) == said.strip()
    assert stacks == [0]
    assert json.loads(mine.store.get(_KEY))["wants_stacks"]


def test_other_ranks_look_at_the_first_alone():
    mine = world(1, size=3)
    looks(mine, (0.0, 60.0), (0, 1))
    with pytest.raises(Ended):
        looks(mine, (120.0,), (1,))
    assert "rank 0 of 3" in json.loads(mine.store.get(_KEY))["message"]


def test_who_has_parted_misses_nobody():
    mine = world(0)
    mine.has_parted.set()
    looks(mine, (0.0, 60.0), (0,))


def test_only_the_first_verdict_is_said(capsys: pytest.CaptureFixture[str]):
    mine = world(1)
    say(mine.store, rank=0)
    failure._end_for_all(mine, "another one")
    assert capsys.readouterr().err == ""


def test_a_store_that_does_not_answer_ends_the_rank_without_it(
    capsys: pytest.CaptureFixture[str],
):
    mine = world(0, store=Stopped(), answered_at=time.monotonic() - 44.5)
    late = threading.Timer(10.0, mine.has_parted.set)
    late.start()
    with pytest.raises(Ended, match="1"):
        failure._time_store(mine)  # at 45 s
    late.cancel()
    assert "gave no answer for 45 s" in capsys.readouterr().err


@pytest.mark.parametrize("in_order", [True, False])
def test_a_store_that_is_gone_ends_a_rank_unless_that_parts_too(
    in_order: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(failure, "_HEARD_SECONDS", 0.5)
    mine = world(1, store=Gone())
    if in_order:
        threading.Timer(0.05, mine.has_parted.set).start()
        failure._hear(mine, mine.store)
        assert capsys.readouterr().err == ""
        return
    with pytest.raises(Ended, match="1"):
        failure._hear(mine, mine.store)
    assert "the ranks' store is gone" in capsys.readouterr().err


def test_the_second_rank_speaks_first(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(failure.time, "sleep", waits.append)
    for rank in (1, 2, 0):
        failure._let_rank_1_speak(world(rank, size=3))
    assert waits == [0.02] * 2


@pytest.mark.parametrize(
    ("error", "is_cut"),
    [
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Read error: Connection reset by peer"), True),
        (RuntimeError("writev: Broken pipe"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: x.cpp, remote process exited"), True),
        (dist.DistNetworkError("of any words"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("Broken pipe"), False),
    ],
)
def test_a_broken_connection_waits_for_who_knows_which_rank_is_gone(
    error: Exception, is_cut: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(failure, "_CUT_SECONDS", 0.05)
    monkeypatch.setattr(failure, "BEAT_SECONDS", 0.0)
    mine = world(1)
    monkeypatch.setattr(failure, "_world", mine)
    start = time.monotonic()
    failure.await_verdict(error)
    assert mine.is_cut.is_set() == is_cut
    assert (time.monotonic() - start > 0.05) == is_cut


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_broken_connection_of_a_launch_that_was_stopped_is_told_once_a_node(
    local_rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(failure, "_world", world(1))
    monkeypatch.setattr(stop, "_is_noted", True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(Ended, match="75"):
        failure.await_verdict(RuntimeError("Broken pipe"))
    assert ("rank 1 lost its connection" in capsys.readouterr().err) == (local_rank == "0")


@pytest.mark.parametrize(("rank", "hang_seconds"), [(0, 420.0), (1, 0.0)])
def test_the_first_rank_alone_finds_that_nobody_comes_further(
    rank: int, hang_seconds: float, monkeypatch: pytest.MonkeyPatch
):
    class Thread:
        def __init__(self, **named: Any) -> None:
            pass

        def start(self) -> None:
            pass

    at_exit: list[Any] = []
    monkeypatch.setattr(failure.threading, "Thread", Thread)
    monkeypatch.setattr(failure.atexit, "register", at_exit.append)
    monkeypatch.setattr(failure.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(failure.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(failure.dist.distributed_c10d, "_get_default_store", dist.HashStore)
    failure.listen(WaitingConfig(silence_seconds=9.0, hang_minutes=7.0))
    assert failure._world is not None
    watch = failure._world.watch
    assert (watch.silence_seconds, watch.hang_seconds) == (9.0, hang_seconds)
    assert at_exit == [failure.part]


def test_what_a_rank_has_said_is_written_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends: list[int] = []
    monkeypatch.setattr(failure.os, "_exit", ends.append)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        out.write("said")
        err.write("warned")
        END(3)
        assert (tmp_path / "out").read_text() == "said"
        assert (tmp_path / "err").read_text() == "warned"
    assert ends == [3]
