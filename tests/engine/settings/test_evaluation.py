import pytest

from engine.settings.evaluation import is_evaluated, num_evaluations


def steps_of(total: int, eval_every: int | None) -> list[int]:
    return [step for step in range(1, total + 1) if is_evaluated(step, total, eval_every)]


@pytest.mark.parametrize("total", [10, 11, 19, 20, 22, 35, 99, 100, 1234, 100_000])
def test_a_run_makes_a_curve_by_itself(total: int):
    steps = steps_of(total, None)
    assert 10 <= len(steps) <= 20
    assert steps[-1] == total


@pytest.mark.parametrize("total", [1, 2, 9])
def test_a_short_run_looks_after_every_step(total: int):
    assert steps_of(total, None) == list(range(1, total + 1))


def test_the_steps_between_may_be_named_and_0_is_the_end_alone():
    assert steps_of(10, 4) == [4, 8, 10]
    assert steps_of(10, 0) == [10]
    assert steps_of(10, 11) == [10]


@pytest.mark.parametrize("total", [1, 9, 10, 19, 1234])
@pytest.mark.parametrize("every", [None, 0, 1, 4, 5000])
def test_looks_are_counted(total: int, every: int | None):
    assert num_evaluations(total, every) == len(steps_of(total, every))
