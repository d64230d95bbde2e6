import pytest

from engine.errors import UserError
from engine.ranks.silence import BEAT_SECONDS
from engine.settings.waiting import WaitingConfig


@pytest.mark.parametrize("name", ["join_seconds", "silence_seconds"])
def test_waiting_must_be_for_some_time(name: str):
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"waiting.{name.replace('_', '-')}"):
            WaitingConfig(**{name: value})


def test_no_rank_costs_two_minutes_by_default():
    waiting = WaitingConfig()
    assert waiting.join_seconds < 120
    assert waiting.orphan_seconds < 120
    assert waiting.silence_seconds + BEAT_SECONDS + 30 < 120  # torchrun kills a stopped rank late


def test_a_silence_holds_many_beats():
    assert WaitingConfig().silence_seconds >= 8 * BEAT_SECONDS


def test_zero_is_for_ever_where_a_hang_may_be_none():
    assert WaitingConfig(hang_minutes=0.0).hang_minutes == 0
