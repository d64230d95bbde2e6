import threading
import time

import pytest

from engine.checkpoints.background import Background
from engine.errors import UserError


def test_work_runs_beside_and_is_waited_for():
    background, may_end, done = Background(), threading.Event(), []

    def work() -> None:
        may_end.wait()
        done.append(threading.current_thread().name)

    background.start(work, name="saving")
    assert background.wait(0.01) is False
    assert done == []
    may_end.set()
    assert background.wait() is True
    assert done == ["saving"]
    assert background.wait() is True  # nothing is left


def test_next_work_begins_when_that_before_is_done():
    background, order = Background(), []

    def slow() -> None:
        time.sleep(0.1)
        order.append("slow")

    background.start(slow, name="a")
    background.start(lambda: order.append("next"), name="b")
    background.wait()
    assert order == ["slow", "next"]


@pytest.mark.parametrize("error", [UserError("a full disk"), RuntimeError("a bug"), SystemExit(3)])
def test_what_work_raises_is_raised_once_by_who_waits(error: BaseException):
    background = Background()

    def fail() -> None:
        raise error

    background.start(fail, name="a")
    while not background.has_failed:
        time.sleep(0.001)
    with pytest.raises(type(error)) as raised:
        background.wait()
    assert raised.value is error
    assert not background.has_failed
    assert background.wait() is True


def test_failed_work_is_told_of_before_the_next_begins():
    background, begun = Background(), []

    def fail() -> None:
        raise UserError("a full disk")

    background.start(fail, name="a")
    with pytest.raises(UserError, match="a full disk"):
        background.start(lambda: begun.append(1), name="b")
    background.start(lambda: begun.append(2), name="c")
    background.wait()
    assert begun == [2]


def test_thread_does_not_hold_the_process():
    background, may_end = Background(), threading.Event()
    background.start(may_end.wait, name="stuck")  # type: ignore[arg-type]
    (thread,) = [t for t in threading.enumerate() if t.name == "stuck"]
    assert thread.daemon
    may_end.set()
    background.wait()
