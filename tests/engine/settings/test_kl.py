import dataclasses
import typing

import pytest

from engine.errors import UserError
from engine.settings.kl import KLConfig
from kernels.kl_estimate import KlEstimator


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("coef", -0.01, "at least 0"),
        ("target", 0.0, "positive"),
        ("horizon", 0, "at least 1"),
    ],
)
def test_number_that_means_nothing_is_refused(name: str, value: float, rule: str):
    with pytest.raises(UserError, match=f"kl.{name} must be {rule}, got"):
        dataclasses.replace(KLConfig(), **{name: value})


def test_no_penalty_is_a_choice():
    assert KLConfig(coef=0.0).coef == 0.0


def test_what_is_not_said_is_the_papers():
    found = KLConfig()
    assert (found.coef, found.control, found.estimator) == (0.02, "fixed", "k1")  # C.4, eq. 2
    assert (found.target, found.horizon) == (6.0, 10_000)  # Ziegler et al. 2019


def test_estimators_are_those_of_the_kernel():
    hint = typing.get_type_hints(KLConfig)["estimator"]
    assert typing.get_args(hint) == typing.get_args(KlEstimator)
