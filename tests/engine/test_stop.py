"""A signal stops a run at a step boundary that all ranks agree on."""

import os
import signal

import pytest

from engine.parallel import Parallel, start_parallel
from engine.settings.layout import ParallelLayout
from engine.stop import EXIT_STATUS, SIGNALS, StopSignals
from tests.ranks import run_ranks


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=0)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_noted_instead_of_ending_the_process(number: signal.Signals, parallel: Parallel):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignals(parallel) as stop:
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        assert stop.is_asked()
        assert stop.is_asked()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_stopped_run_leaves_with_the_status_that_asks_for_another_try(
    parallel: Parallel, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped, StopSignals(parallel) as stop:
        stop.leave(7)
    assert stopped.value.code == EXIT_STATUS == 75
    assert "at step 7" in capsys.readouterr().out


def answers() -> list[bool]:
    """What a rank hears before and after a signal that reaches rank 1 only."""
    parallel = start_parallel(ParallelLayout(), seed=0)
    with StopSignals(parallel) as stop:
        before = stop.is_asked()
        if parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [before, stop.is_asked()]


def test_ranks_agree_on_a_signal_that_reached_one_of_them():
    assert run_ranks(answers, 2) == [[False, True]] * 2
