"""All ranks of a start meet, or those that did not come or were started otherwise are named."""

import datetime
import json
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.errors import UserError
from engine.ranks import meeting
from engine.ranks.likeness import start_in_words
from engine.ranks.meeting import Arrival, meet, stay_away
from tests.recipe_runs import ROOT, sft_command, start, start_ranks
from tests.test_slurm import free_ports


def arrival(rank: int, world_size: int = 3, seconds: float = 20.0, start: str = "") -> Arrival:
    return Arrival(rank=rank, world_size=world_size, address="node:1", seconds=seconds, start=start)


def started(lr: float, world_size: int = 3) -> str:
    return start_in_words({"lr": lr}, world_size)


def together(store: dist.Store, seats: list[Arrival]) -> dict[int, object]:
    """What comes of each rank's meeting, by rank."""
    results: dict[int, object] = {}

    def come(each: Arrival) -> None:
        try:
            results[each.rank] = meet(store, each)
        except BaseException as error:
            results[each.rank] = error

    threads = [threading.Thread(target=come, args=(each,)) for each in seats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_get_the_same_part_of_the_store():
    results = together(dist.HashStore(), [arrival(2), arrival(0), arrival(1)])
    for rank, part in results.items():
        assert isinstance(part, dist.Store)
        part.set(f"rank {rank}", "here")
    assert all(results[0].check([f"rank {rank}"]) for rank in range(3))


def test_a_later_start_sees_nothing_of_the_one_before():
    store = dist.HashStore()
    first = together(store, [arrival(r) for r in range(3)])
    first[0].set("said", "once")
    # The first rank comes last: what it has told those of before is still there.
    again = together(store, [arrival(r, seconds=3.0) for r in (2, 1, 0)])
    assert [again[rank].check(["said"]) for rank in range(3)] == [False] * 3
    again[1].set("new", "")
    assert again[2].check(["new"])


def test_a_rank_of_the_start_before_is_not_taken_for_one_of_this():
    store = dist.HashStore()
    together(store, [arrival(r) for r in range(3)])
    results = together(store, [arrival(0, seconds=1.0), arrival(2, seconds=1.0)])
    assert "rank 1 of 3 did not come" in str(results[0])


def test_the_first_rank_names_those_that_did_not_come_and_the_others_are_silent():
    results = together(dist.HashStore(), [arrival(0, 4, 1.0), arrival(2, 4, 1.0)])
    assert isinstance(results[0], UserError)
    assert str(results[0]) == (
        "ranks 1, 3 of 4 did not come to node:1 within 1 s (--waiting.join-seconds); "
        "ranks 0, 2 came"
    )
    assert isinstance(results[2], SystemExit)
    assert results[2].code == 2


def test_a_rank_that_does_not_come_is_named_with_its_reason_before_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(meeting, "_GRACE", 1.0)
    store = dist.HashStore()
    stay_away(store, arrival(1), "error: no such option")
    stay_away(store, arrival(1), "error: of a later one, which nobody hears")
    began = time.monotonic()
    results = together(store, [arrival(0), arrival(2)])
    assert time.monotonic() - began < 10
    assert str(results[0]) == "rank 1 of 3 did not come to node:1: error: no such option"
    assert isinstance(results[2], SystemExit)
    assert results[2].code == 2


def test_a_first_rank_that_does_not_come_stays_until_all_others_have_heard():
    store, ended = dist.HashStore(), []
    others = threading.Thread(
        target=lambda: ended.append(together(store, [arrival(1), arrival(2)]))
    )
    others.start()
    began = time.monotonic()
    stay_away(store, arrival(0), "error: no such option")
    assert time.monotonic() - began < 10
    others.join(30)
    assert [results.code for results in ended[0].values()] == [2, 2]  # type: ignore[attr-defined]


def test_ranks_that_all_do_not_come_wait_for_none():
    store, began = dist.HashStore(), time.monotonic()
    for rank in (2, 1, 0):
        stay_away(store, arrival(rank), "error: no such option")
    assert time.monotonic() - began < 1


class Written(dist.HashStore):
    """A store that knows which keys were set."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def set(self, key: str, value: str) -> None:  # type: ignore[override]
        super().set(key, value)
        self.keys.append(key)


def test_the_first_rank_and_its_store_stay_until_those_that_came_have_heard():
    store = Written()
    other = threading.Thread(target=together, args=(store, [arrival(2, 3, 4.0)]))
    other.start()
    with pytest.raises(UserError):
        meet(store, arrival(0, 3, 4.0))
    assert store.keys[-1].endswith("/2 goes")
    other.join()


def test_without_the_first_rank_the_others_say_so_the_lowest_before_them(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(meeting, "_GRACE", 0.5)
    results = together(dist.HashStore(), [arrival(2, 3, 2.0), arrival(1, 3, 2.0)])
    assert list(results) == [1, 2]
    assert all("rank 0 of 3 did not come" in str(results[rank]) for rank in (1, 2))


def test_a_store_that_is_gone_is_one_line():
    here = datetime.timedelta(seconds=5)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=here)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=here)
    del server
    with pytest.raises(UserError, match="rank 1 of 3 found nobody to meet at node:1"):
        meet(client, arrival(1))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Whether the process was ended; in a tenth of the time that it has."""
    ended = threading.Event()
    monkeypatch.setattr(meeting.os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(meeting, "_GRACE", 0.1)
    return ended


def test_a_library_that_does_not_return_is_ended(
    ended: threading.Event,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told"))
    with meeting.ending_where_stuck(arrival(1, seconds=0.1)):
        assert ended.wait(10)
    words = "what listens there does not answer: no rank, or one that is stopped"
    assert words in capsys.readouterr().err
    told = json.loads((tmp_path / "told").read_text())["message"]["message"]
    assert words in told


def test_a_library_that_has_returned_is_not_ended(ended: threading.Event):
    with meeting.ending_where_stuck(arrival(1, seconds=0.1)):
        pass
    time.sleep(0.5)
    assert not ended.is_set()


def test_a_rank_that_was_started_otherwise_ends_all_and_the_first_alone_says_so():
    starts = [started(0.1), started(0.1), started(0.5), started(0.1)]
    results = together(dist.HashStore(), [arrival(r, 4, start=starts[r]) for r in range(4)])
    assert isinstance(results[0], UserError)
    assert str(results[0]).startswith("rank 2 was not started as rank 0 was: lr 0.5, not 0.1\n")
    assert all(isinstance(results[rank], SystemExit) for rank in (1, 2, 3))
    assert {results[rank].code for rank in (1, 2, 3)} == {2}


def test_the_report_of_another_nodes_torchrun_says_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told"))
    starts = [started(0.1, 2), started(0.5, 2)]
    together(dist.HashStore(), [arrival(r, 2, start=starts[r]) for r in range(2)])
    told = json.loads((tmp_path / "told").read_text())["message"]["message"]
    assert told.startswith("error: rank 1 was not started as rank 0 was: lr 0.5, not 0.1")


def test_the_first_rank_waits_no_longer_where_one_was_started_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    """Rank 1 is of a launch of two, and rank 0 of one of three, whose others have not come."""
    monkeypatch.setattr(meeting, "_GRACE", 0.5)
    ours, theirs = started(0.1), started(0.1, world_size=2)
    before = time.monotonic()
    results = together(
        dist.HashStore(), [arrival(0, 3, 60.0, start=ours), arrival(1, 2, 60.0, start=theirs)]
    )
    assert time.monotonic() - before < 30
    assert "rank 1 was not started as rank 0 was: world_size 2, not 3\n" in str(results[0])
    assert isinstance(results[1], SystemExit)


def test_a_rank_that_says_nothing_of_its_start_is_of_another_version():
    results = together(dist.HashStore(), [arrival(0, 2, start=started(0.1, 2)), arrival(1, 2)])
    assert "rank 1 was not started as rank 0 was" in str(results[0])


@pytest.mark.parametrize(("said", "status"), [("", None), ("rank 2 did not come", 2)])
def test_one_process_alone_is_a_rank_where_two_come_as_the_same_one(
    said: str, status: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Two runs on one port each bring a rank 1, and the first rank answers both."""
    monkeypatch.setattr(meeting.uuid, "uuid4", lambda: uuid.UUID(int=5))
    store = dist.HashStore()
    store.set(f"meeting/{uuid.UUID(int=5).hex}/part", "start")
    store.set("meeting/start/1 is there", "the other's token and digest")
    store.set("meeting/start/said", said)
    with pytest.raises((UserError, SystemExit)) as ended:
        meet(store, arrival(1))
    if status is None:
        assert "another process has come to node:1 as rank 1 of 3" in str(ended.value)
    else:  # the first rank has said it
        assert ended.value.code == status
    assert not store.check(["meeting/start/1 goes"])


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_processes_that_were_started_otherwise_end_with_one_message(
    first: int, tiny: Path, tmp_path: Path
):
    """Ranks of two runs, by srun without an agent: both end before the first step."""
    port, other = free_ports()[0], ("--adam.lr", 0.5, "--seed", 7)
    commands = [
        sft_command(tiny, tmp_path / "a", "--layout.tp", 2),
        sft_command(tiny, tmp_path / "b", "--layout.tp", 2, *other),
    ]
    started: dict = {}
    try:
        for rank in (first, 1 - first):
            started |= start_ranks(commands[rank], tmp_path, port, [rank])
        assert [started[rank].wait(100) for rank in (0, 1)] == [2, 2]
        said, advice = started[0].err.read_text().splitlines()
        assert said.startswith("error: rank 1 was not started as rank 0 was: ")
        assert "adam.lr 0.5, not " in said
        assert f"directory {tmp_path / 'b'}, not {tmp_path / 'a'}" in said
        assert "seed 7, not 0" in said
        assert "MASTER_PORT" in advice
        assert (started[0].out.read_text(), started[1].said()) == ("", "")
        assert not (tmp_path / "a").exists()
    finally:
        for rank in started.values():
            rank.end()


@pytest.mark.slow
@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_rank_whose_options_are_a_mistake_keeps_no_other_waiting(
    mistaken: int, tiny: Path, tmp_path: Path
):
    """Ranks by srun, without an agent that would end the others."""
    port = free_ports()[0]
    command = sft_command(tiny, tmp_path / "run", "--layout.tp", 2)
    commands = {1 - mistaken: command, mistaken: [*command, "--no-such-option", "1"]}
    began, started = time.monotonic(), {}
    try:
        for rank in (1, 0):
            started |= start_ranks(commands[rank], tmp_path, port, [rank])
        assert [started[rank].wait(80) for rank in (0, 1)] == [2, 2]  # of the 90 s that ranks wait
        said = started[0].err.read_text()
        assert "--no-such-option" in said
        assert said.startswith("error: rank 1 of 2 did not come" if mistaken else "error: ")
        assert "Traceback" not in said + started[1].said()
    finally:
        for rank in started.values():
            rank.end()
    assert time.monotonic() - began < 80


@pytest.mark.slow
def test_a_rank_of_another_checkout_is_refused(tiny: Path, tmp_path: Path):
    for floor in ("engine", "models", "kernels", "recipes"):
        shutil.copytree(ROOT / floor, tmp_path / "other" / floor)
    with (tmp_path / "other" / "engine" / "losses.py").open("a") as file:
        file.write("# another line\n")
    port, command = free_ports()[0], sft_command(tiny, tmp_path / "run", "--layout.tp", 2)
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    place |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(tmp_path / "other")}
    script = [str(tmp_path / "other" / command[0]), *command[1:]]
    first = start_ranks(command, tmp_path, port, [0])[0]
    second = start(script, tmp_path / "rank_1", environment=place)
    try:
        assert (first.wait(100), second.wait(100)) == (2, 2)
        assert "rank 1 was not started as rank 0 was: code " in first.said()
        assert second.said() == ""
    finally:
        first.end()
        second.end()
