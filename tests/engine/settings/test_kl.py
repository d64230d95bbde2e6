import dataclasses
import typing

import pytest

from engine.errors import UserError
from engine.settings.kl import KLConfig
from engine.settings.ppo import PPOConfig
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


def test_a_coefficient_of_0_cannot_adapt():
    with pytest.raises(UserError, match="kl.coef 0 stays 0"):
        KLConfig(coef=0.0, control="adaptive")


@pytest.mark.parametrize(("horizon", "fits"), [(13, True), (12, False), (10, False), (1, False)])
def test_a_horizon_must_outlast_an_iteration(horizon: int, fits: bool):
    config = KLConfig(control="adaptive", horizon=horizon)
    if fits:  # 0.2 x 64 = 12.8
        config.check_batch(64)
        return
    with pytest.raises(UserError) as error:
        config.check_batch(64)
    assert f"kl.horizon {horizon} must be over 0.2 x --rollout-batch-size 64 = 12.8" in str(
        error.value
    )


def test_a_horizon_at_the_limit_is_refused_with_the_config():
    with pytest.raises(UserError, match="kl.horizon 102 must be over"):
        PPOConfig(kl=KLConfig(control="adaptive", horizon=102))  # of 512 responses
    PPOConfig(kl=KLConfig(control="fixed", horizon=102))
