"""One curve: what something costs at several sizes, the exponent it grows with, and the expected.

    cost ~ size^exponent, by least squares in log-log

The expected exponent is that of a formula at the same sizes, so that attention's share or a sort's
logarithm is in it. If a share s of the cost at a size grows with one power more than expected, the
slope there is steeper by s: the tolerance is the share of an accidental square that goes unseen.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SECONDS = "CPU s"
TIME_TOLERANCE = 0.15
"""Of exponents of seconds. Our choice: the least of a few runs is off by some 5% on a machine that
others share, which is 0.03 over a factor of eight. Arrays that outgrow a cache cost up to 0.1; so a
square is seen once it takes a seventh of the cost."""
COUNT_TOLERANCE = 0.05
"""Of exponents of bytes and messages, which are counted: roundings and headers."""
MOST_OVER_FORMULA = 1.05
"""Of a count whose formula says the count itself: what else is sent, some norms and metrics."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """How does a cost grow with a size?"""

    what: str
    """What is done, and with what held fixed."""
    variable: str
    """What is made larger."""
    unit: str = SECONDS
    sizes: Sequence[int]
    quick_sizes: Sequence[int] = ()
    formula: str
    """The expected cost in words, up to a factor."""
    expected: Callable[[int], float]
    """The same as a function."""
    measure: Callable[[int], float]
    """Returns what a size costs."""
    tolerance: float = TIME_TOLERANCE

    def ask(self, *, is_quick: bool = False) -> "Curve":
        """Measure all sizes; seconds that grow too fast once more, for whoever disturbed them does
        not come at the same sizes again, and the least of both counts."""
        curve = self._curve(is_quick)
        if not curve.is_as_expected and self.unit == SECONDS:
            again = self._curve(is_quick)
            costs = tuple(map(min, curve.costs, again.costs))
            curve = dataclasses.replace(curve, costs=costs)
        return curve

    def _curve(self, is_quick: bool) -> "Curve":
        sizes = tuple(self.quick_sizes if is_quick and self.quick_sizes else self.sizes)
        return Curve(
            what=self.what,
            variable=self.variable,
            unit=self.unit,
            sizes=sizes,
            costs=tuple(self.measure(size) for size in sizes),
            formula=self.formula,
            expected_costs=tuple(self.expected(size) for size in sizes),
            tolerance=self.tolerance,
        )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Costs at sizes, beside a formula's."""

    what: str
    variable: str
    unit: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    formula: str
    expected_costs: tuple[float, ...]
    tolerance: float
    is_absolute: bool = False
    """Whether the formula says the costs themselves, not only how they grow."""

    @functools.cached_property
    def exponent(self) -> float:
        """What the costs grow with."""
        return exponent_of(self.sizes, self.costs)

    @functools.cached_property
    def last_slope(self) -> float:
        """The exponent between the two largest sizes alone, where fixed costs hide least."""
        return exponent_of(self.sizes[-2:], self.costs[-2:])

    @functools.cached_property
    def expected_exponent(self) -> float:
        """What the formula grows with."""
        return exponent_of(self.sizes, self.expected_costs)

    @property
    def most_over_formula(self) -> float:
        """The largest ratio of a cost to the formula's."""
        return max(c / e for c, e in zip(self.costs, self.expected_costs, strict=True))

    @property
    def is_as_expected(self) -> bool:
        """Whether the cost grows no faster than it should, nor is above an absolute formula."""
        is_flat = self.exponent <= self.expected_exponent + self.tolerance
        return is_flat and not (self.is_absolute and self.most_over_formula > MOST_OVER_FORMULA)


def exponent_of(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log cost over log size by least squares. ValueError where a size or cost
    is not above 0, or all sizes are one."""
    if min(sizes) <= 0 or min(costs) <= 0 or len(set(sizes)) < 2:
        raise ValueError(f"no slope through costs {list(costs)} at sizes {list(sizes)}")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def cpu_seconds(call: Callable[[], object], *, num_runs: int = 3, enough: float = 0.1) -> float:
    """Return the least CPU seconds of this process, all its threads, of a call that has run once:
    of so many runs, and more while they have not taken `enough` seconds together."""
    call()
    times: list[float] = []
    while len(times) < num_runs or (sum(times) < enough and len(times) < 100):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


def logarithmic(size: int) -> float:
    """n log n: what a sort may cost."""
    return size * math.log2(size)


def linear(size: int) -> float:
    """n."""
    return float(size)


def constant(size: int) -> float:
    """The same whatever the size."""
    return 1.0
