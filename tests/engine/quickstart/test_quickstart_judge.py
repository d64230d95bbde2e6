import pytest

from engine.quickstart.judge import preferred


def test_preferred_splits_ties():
    won = preferred([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.0])
    assert won["win_rate_vs_sft"] == pytest.approx(2.5 / 4)
    low, high = won["win_rate_interval"]
    assert low < 2.5 / 4 < high
