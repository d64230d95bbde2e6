"""All ranks of a start meet, or those that did not come are named."""

import datetime
import json
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.errors import UserError
from engine.ranks import meeting
from engine.ranks.meeting import Arrival, meet


def arrival(rank: int, world_size: int = 3, seconds: float = 20.0) -> Arrival:
    return Arrival(rank=rank, world_size=world_size, address="node:1", seconds=seconds)


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
    other = threading.Thread(target=together, args=(store, [arrival(2, 3, 1.0)]))
    other.start()
    with pytest.raises(UserError):
        meet(store, arrival(0, 3, 1.0))
    assert store.keys[-1].endswith("/2 goes")
    other.join()


def test_without_the_first_rank_the_others_say_so_the_lowest_before_them(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(meeting, "_GRACE", 0.5)
    results = together(dist.HashStore(), [arrival(2, 3, 0.5), arrival(1, 3, 0.5)])
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
