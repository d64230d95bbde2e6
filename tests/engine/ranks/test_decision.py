"""Several ranks that decide together, each a process."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.errors import UserError
from engine.ranks import decision
from engine.ranks.decision import Council
from tests.ranks import run_ranks


def test_a_process_alone_decides_for_itself():
    assert Council().decide("mine", lambda told: f"decided on {told}") == "decided on ['mine']"
    with pytest.raises(UserError, match="no"):
        Council().decide("", lambda told: _refuse("no"))


def _refuse(why: str) -> str:
    raise UserError(why)


def decisions() -> dict[str, object]:
    """Return what a rank learns in several councils."""
    rank = dist.get_rank()
    called: list[list[str]] = []

    def join(told: list[str]) -> str:
        called.append(told)
        return "+".join(told)

    council = Council()
    found = [council.decide(f"{what}{rank}", join) for what in ("a", "b", "ü\n")]
    found.append(Council().decide(f"another {rank}", join))  # which reads nothing of the first
    return {"found": found, "called": called}


def test_all_ranks_learn_what_the_first_makes_of_all_in_their_order():
    first, *others = run_ranks(decisions, 3)
    assert first["found"] == [
        "a0+a1+a2",
        "b0+b1+b2",
        "ü\n0+ü\n1+ü\n2",
        "another 0+another 1+another 2",
    ]
    assert all(other["found"] == first["found"] for other in others)
    assert len(first["called"]) == 4
    assert all(other["called"] == [] for other in others)


def late_rank(folder: Path) -> float:
    """A rank tells late; the others compute meanwhile, with collectives of their own."""
    council = Council()
    found: list[str] = []

    def take_part() -> None:
        if dist.get_rank() == 1:
            time.sleep(0.5)
        found.append(council.decide(str(dist.get_rank()), "".join))

    start = time.monotonic()
    thread = threading.Thread(target=take_part)
    thread.start()
    total = torch.ones(())
    dist.all_reduce(total)
    seconds = time.monotonic() - start
    was_open = thread.is_alive()
    thread.join()
    assert (found, total.item()) == (["01"], 2.0)
    assert was_open
    return seconds


def test_late_rank_is_waited_for_while_the_others_compute(tmp_path: Path):
    run_ranks(late_rank, 2, tmp_path)


def failures() -> list[str]:
    """Return what this rank is told where the first raises."""
    council, found = Council(), []

    def fail(told: list[str]) -> str:
        raise ValueError("a bug")

    for decide in (lambda told: _refuse(f"no {told}"), fail, "".join):
        try:
            found.append(council.decide(str(dist.get_rank()), decide))
        except (UserError, RuntimeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_error_of_the_first_is_raised_on_all():
    first, second = run_ranks(failures, 2)
    assert first == ["UserError: no ['0', '1']", "ValueError: a bug", "01"]
    assert second == [
        "UserError: no ['0', '1']",
        "RuntimeError: rank 0 failed: ValueError('a bug')",
        "01",
    ]


def slow_reader() -> float:
    """Return how long a rank's error takes, where the other reads it half a second late."""
    council = Council()
    if dist.get_rank() == 1:
        learn = council._await
        council._await = lambda key: (time.sleep(0.5), learn(key))[1]  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises(UserError, match="no"):
        council.decide("", lambda told: _refuse("no"))
    return time.monotonic() - start


def test_first_rank_lives_until_the_others_know_of_its_error():
    first, second = run_ranks(slow_reader, 2)
    assert first >= 0.4


def lost_reader() -> float:
    """Return how long the first waits for a rank that never learns."""
    decision._LAST_WAIT = 0.2
    council = Council()
    start = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(UserError, match="no"):
            council.decide("", lambda told: _refuse("no"))
    else:
        council._store.set(f"council/{council._matter}/0/1", "")  # told, and gone
    return time.monotonic() - start


def test_rank_that_is_lost_is_not_waited_for_without_end():
    first, _ = run_ranks(lost_reader, 2)
    assert 0.2 <= first < 60.0
