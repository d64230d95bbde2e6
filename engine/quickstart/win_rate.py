"""How often one model's answers are preferred to another's, and how sure that is."""

import math
from typing import NamedTuple


class WinRate(NamedTuple):
    """A share of comparisons won, and its 95% confidence interval, all in [0, 1]."""

    rate: float
    low: float
    high: float


def win_rate(wins: int, ties: int, losses: int) -> WinRate:
    """Return the share of comparisons won, a tie counting one half, with Wilson's 95% interval.

    Wilson (1927) solves |rate - p| = z sqrt(p (1 - p) / n) for p. The interval stays inside
    [0, 1] and is sound at 0 wins. Ties vary less than wins and losses: the interval errs on the
    wide side. Raises ValueError without comparisons.
    """
    n = wins + ties + losses
    if n == 0:
        raise ValueError("a win rate needs at least one comparison")
    z = 1.959964  # 97.5% quantile of the normal distribution
    rate = (wins + ties / 2) / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 or n wins an end equals the rate, but for rounding.
    return WinRate(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)))
