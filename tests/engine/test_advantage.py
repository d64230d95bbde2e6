import math

import numpy as np
import pytest
import torch

from engine.advantage import Advantages, KLController, estimate_advantages
from engine.data.examples import Example
from engine.generation.generate import Response
from engine.rollout import join_responses
from engine.score import Scored
from engine.settings.kl import KLConfig
from engine.settings.ppo import PPOConfig

LOG_RATIO = torch.tensor([0.0, 0.0, 0.1, -0.2, 0.0, 0.5])


def estimate(kl_estimator: str = "k1", **changes: object) -> Advantages:
    """Of two responses, of two tokens and of one; the last one's prompt is a single token."""
    prompts = [Example(tokens=np.arange(n), prompt_length=n) for n in (2, 1)]
    responses = [
        Response(sample_index=i, tokens=np.arange(n), logprobs=np.zeros(n), has_eos=True)
        for i, n in enumerate((2, 1))
    ]
    rollout = join_responses(prompts, responses, torch.device("cpu"))
    scored = Scored(
        logprobs=LOG_RATIO - 1.0,
        num_checked=2,
        ref_logprobs=torch.full((6,), -1.0),
        values=torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0, 4.0]),
        scores=torch.tensor([3.0, -1.0]),
        raw_scores=torch.tensor([3.0, -1.0]),
    )
    config = PPOConfig(kl=KLConfig(estimator=kl_estimator), **({"lam": 0.5} | changes))
    return estimate_advantages(rollout, scored, config, kl_coef=0.5)


def test_score_is_at_the_last_token_and_the_penalty_at_every_one():
    found = estimate()
    # -0.5 x (logprob - ref_logprob), and the score
    expected = [0.0, 0.0, -0.05, 0.1 + 3.0, 0.0, -0.25 - 1.0]
    torch.testing.assert_close(found.rewards, torch.tensor(expected))


def test_advantages_by_hand():
    found = estimate()
    # From the end: A_3 = 3.1 - 2;  A_2 = (-0.05 + V_3 - V_2) + 0.5 A_3;  A_5 = -1.25 - 4
    expected = torch.tensor([0.0, 0.0, 0.95 + 0.5 * 1.1, 1.1, 0.0, -5.25])
    torch.testing.assert_close(found.advantages, expected)
    returns = torch.tensor([0.0, 0.0, 1.5 + 1.0, 1.1 + 2.0, 0.0, -1.25])
    torch.testing.assert_close(found.returns, returns)


def test_discount_weighs_the_next_value():
    found = estimate(gamma=0.9, lam=0.0)
    expected = torch.tensor([0.0, 0.0, -0.05 + 0.9 * 2.0 - 1.0, 1.1, 0.0, -5.25])
    torch.testing.assert_close(found.advantages, expected)


def test_whitening_is_of_the_response_tokens_alone():
    whitening = estimate().whitening
    advantages = torch.tensor([1.5, 1.1, -5.25])
    assert whitening is not None
    torch.testing.assert_close(whitening.mean, advantages.mean())
    torch.testing.assert_close(whitening.rstd, 1.0 / advantages.std())
    assert estimate(whiten_advantages=False).whitening is None


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [("k1", 0.5), ("k2", 0.125), ("k3", torch.tensor(-0.5).exp().item() - 1 + 0.5)],
)
def test_penalty_is_of_the_estimator_that_was_chosen(estimator: str, kl: float):
    found = estimate(kl_estimator=estimator)
    assert found.rewards[5].item() == pytest.approx(-1.0 - 0.5 * kl)


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.6, 0.1 * (1 + 0.1 * 256 / 10_000)),  # 10% above the target of 6
        (60.0, 0.1 * (1 + 0.2 * 256 / 10_000)),  # the error is cut at 20%
        (0.0, 0.1 * (1 - 0.2 * 256 / 10_000)),
        (6.0, 0.1),
    ],
)
def test_controller_moves_as_in_ziegler(kl: float, coef: float):
    controller = KLController(KLConfig(coef=0.1, control="adaptive", target=6.0, horizon=10_000))
    controller.update(kl, num_responses=256)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_controller_settles_where_the_kl_is_the_target():
    controller = KLController(KLConfig(coef=0.02, control="adaptive", target=2.0, horizon=100))
    for _ in range(2000):  # a policy whose KL is inversely proportional to the coefficient
        controller.update(0.4 / controller.coef, num_responses=64)
    assert controller.coef == pytest.approx(0.2, rel=1e-3)


def test_fixed_coefficient_stays():
    controller = KLController(KLConfig(coef=0.1))
    controller.update(60.0, num_responses=256)
    assert controller.coef == 0.1


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_kl_that_is_not_finite_moves_no_coefficient(kl: float):
    controller = KLController(KLConfig(coef=0.1, control="adaptive", target=6.0, horizon=100))
    controller.update(kl, 64)
    assert controller.coef == 0.1


@pytest.mark.parametrize("num_responses", [1, 64, 512])
def test_coefficient_stays_positive_under_the_shortest_horizon(num_responses: int):
    horizon = math.floor(0.2 * num_responses) + 1
    config = KLConfig(coef=0.02, control="adaptive", horizon=horizon)
    config.check_batch(num_responses)
    controller = KLController(config)
    for _ in range(20):
        controller.update(0.0, num_responses)
        assert controller.coef > 0.0
