import numpy as np
import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.layout import ParallelLayout
from engine.training.ema import EMA
from engine.training.optimizer import Optimizer
from engine.training.passes import forward, forward_backward
from tests.tiny import random_network

TOKENS = np.random.default_rng(0).integers(0, 100, 40)
BATCH = pack([Example(tokens=TOKENS, prompt_length=1)], multiple_of=1)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def optimizer_of(parallel: Parallel, dtype: str = "fp32") -> Optimizer:
    network = random_network("language", parallel, dtype=dtype)
    return Optimizer(network, AdamConfig(lr=1e-2, schedule="constant"), total_steps=9)


def take_step(optimizer: Optimizer) -> None:
    optimizer.zero_gradients()
    forward_backward(optimizer.network, [BATCH], NegativeLogLikelihood(39))
    optimizer.step(0)


def weights(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in optimizer.network.modules[0].parameters()]


def test_average_follows_the_formula(parallel: Parallel):
    # shadow <- 0.9 shadow + 0.1 weights, from the first weights on
    optimizer = optimizer_of(parallel)
    ema = EMA(optimizer, 0.9)
    expected = weights(optimizer)
    for _ in range(3):
        take_step(optimizer)
        ema.update()
        pairs = zip(expected, weights(optimizer), strict=True)
        expected = [0.9 * shadow + 0.1 * weight for shadow, weight in pairs]
    averages = {parameter: shadow for parameter, _, shadow in ema.owned_shadows()}
    for parameter, average in zip(optimizer.network.modules[0].parameters(), expected, strict=True):
        shadow = averages[parameter].view_as(parameter)
        torch.testing.assert_close(shadow, average, rtol=1e-6, atol=1e-7)
        assert not torch.equal(average, parameter)


def test_average_of_bf16_weights_is_of_their_fp32_masters(parallel: Parallel):
    optimizer = optimizer_of(parallel, "bf16")
    ema = EMA(optimizer, 0.5)
    first = [master.clone() for _, _, master in optimizer.owned_masters()]
    take_step(optimizer)
    ema.update()
    for shadow, before, (_, _, master) in zip(
        ema.shadows, first, optimizer.owned_masters(), strict=True
    ):
        assert shadow.dtype is torch.float32
        torch.testing.assert_close(shadow, 0.5 * before + 0.5 * master)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_block_runs_on_the_average_and_the_weights_come_back(dtype: str, parallel: Parallel):
    optimizer = optimizer_of(parallel, dtype)
    ema = EMA(optimizer, 0.9)
    (at_first,) = forward(optimizer.network, [BATCH])
    take_step(optimizer)  # no update: the average is still the first weights
    trained, masters = weights(optimizer), [m.clone() for _, _, m in optimizer.owned_masters()]
    with ema.weights():
        (inside,) = forward(optimizer.network, [BATCH])
    assert torch.equal(inside, at_first)
    for before, after in zip(trained, weights(optimizer), strict=True):
        assert torch.equal(before, after)
    for before, (_, _, after) in zip(masters, optimizer.owned_masters(), strict=True):
        assert torch.equal(before, after)
    (outside,) = forward(optimizer.network, [BATCH])
    assert not torch.equal(outside, at_first)


def test_weights_come_back_after_an_error(parallel: Parallel):
    optimizer = optimizer_of(parallel)
    ema = EMA(optimizer, 0.9)
    take_step(optimizer)
    trained = weights(optimizer)
    with pytest.raises(RuntimeError), ema.weights():
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(trained, weights(optimizer), strict=True))
