import numpy as np
import pytest

from engine.quickstart.win_rate import win_rate


def test_interval_equals_a_published_example():
    # Newcombe 1998, Table I: 81 of 263, Wilson's score interval 0.2553 to 0.3662.
    rate, low, high = win_rate(81, 0, 263 - 81)
    assert rate == pytest.approx(81 / 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_ties_count_one_half():
    assert win_rate(6, 4, 0) == win_rate(8, 0, 2)
    assert win_rate(0, 7, 0).rate == 0.5


def test_interval_mirrors_when_sides_swap():
    rate, low, high = win_rate(30, 5, 12)
    other = win_rate(12, 5, 30)
    assert other == pytest.approx((1 - rate, 1 - high, 1 - low))


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (1, 0), (0, 50), (50, 0)])
def test_interval_stays_inside_zero_and_one_and_is_not_empty(wins, losses):
    rate, low, high = win_rate(wins, 0, losses)
    assert 0.0 <= low <= rate <= high <= 1.0
    assert high - low > 0.01


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.6, 0.9):
        wins = rng.binomial(200, truth, size=2000)
        rates = [win_rate(int(w), 0, 200 - int(w)) for w in wins]
        covered = np.mean([r.low <= truth <= r.high for r in rates])
        assert 0.93 < covered < 0.97


def test_no_comparisons_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        win_rate(0, 0, 0)
