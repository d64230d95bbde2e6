import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.feed import pack_for
from engine.losses import (
    ClippedPolicyLoss,
    NegativeLogLikelihood,
    clipped_value_loss,
    comparison_loss,
    last_readings,
    mean_language_loss,
    pair_accuracy,
)
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.passes import LanguageLoss, forward
from kernels.moments import Whitening
from tests.tiny import random_network


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def batch_of(fields: dict[str, list[float]]) -> PackedBatch:
    """Sequences of 3 and 4 tokens, prompts of 1 and 2, and a padding sequence of 1."""
    arrays = {name: np.array(values) for name, values in fields.items()}
    units = [
        Example(
            tokens=np.arange(3),
            prompt_length=1,
            fields={name: array[:3] for name, array in arrays.items()},
        ),
        Example(
            tokens=np.arange(4),
            prompt_length=2,
            fields={name: array[3:7] for name, array in arrays.items()},
        ),
    ]
    return pack(units, multiple_of=8)


def losses_of(
    loss: LanguageLoss, batch: PackedBatch, logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] token losses as the head asks for them, of the predicted tokens; derivatives [T]."""
    positions = batch.mask.nonzero()[:, 0]
    losses, derivatives, *_ = loss.token_loss(batch)(logprobs[positions], positions)
    return losses, torch.zeros(len(logprobs)).index_copy(0, positions, derivatives)


def policy_metrics_of(
    loss: ClippedPolicyLoss, batch: PackedBatch, logprobs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The metrics as the head has them made: of the terms of the predicted tokens."""
    positions = batch.mask.nonzero()[:, 0]
    _, _, terms = loss.token_loss(batch)(logprobs[positions], positions)
    return loss.metrics(batch, torch.zeros(3, len(logprobs)).index_copy(1, positions, terms))


def test_language_loss_is_the_mean_over_global_targets():
    batch = batch_of({})
    logprobs = torch.tensor([9.0, -1.0, -2.0, 9.0, 9.0, -3.0, -4.0, 9.0])
    loss = NegativeLogLikelihood(20, "ptx_loss")
    losses, derivatives = losses_of(loss, batch, logprobs)
    assert losses.sum().item() == pytest.approx(0.5)
    assert torch.equal(derivatives, batch.mask / torch.tensor(-20.0))
    assert {k: v.item() for k, v in loss.metrics(batch, logprobs).items()} == {
        "ptx_loss": pytest.approx(0.5)
    }


def test_policy_loss_by_hand():
    advantages = [7.0, 1.0, -1.0, 7.0, 7.0, 1.0, -1.0]
    batch = batch_of({"logprobs": [0.0] * 7, "advantages": advantages})
    ratios = torch.tensor([1.0, 1.5, 1.5, 1.0, 1.0, 0.5, 0.5, 1.0])
    loss = ClippedPolicyLoss(num_targets=torch.tensor(10.0), cliprange=0.2, whitening=None)
    # max(-A r, -A clip(r)): an advantage is cut above 1.2, a disadvantage below 0.8
    expected = torch.tensor([-1.2, 1.5, -0.5, 0.8]) / 10
    torch.testing.assert_close(losses_of(loss, batch, ratios.log())[0], expected)
    found = policy_metrics_of(loss, batch, ratios.log())
    assert found["policy_loss"].item() == pytest.approx(expected.sum().item())
    assert found["clip_fraction"].item() == pytest.approx(2 / 10)
    assert found["ratio_min"].item() == pytest.approx(0.5)
    assert found["ratio_max"].item() == pytest.approx(1.5)


def test_policy_gradient_at_ratio_one_is_the_whitened_advantage():
    advantages = [7.0, 1.0, -2.0, 7.0, 7.0, 3.0, 0.0]
    batch = batch_of({"logprobs": [-1.0] * 7, "advantages": advantages})
    logprobs = torch.full((8,), -1.0)
    whitening = Whitening(torch.tensor(0.5), torch.tensor(2.0))
    loss = ClippedPolicyLoss(num_targets=torch.tensor(4.0), cliprange=0.2, whitening=whitening)
    _, derivatives = losses_of(loss, batch, logprobs)
    # -(A - 0.5) x 2 / 4, nothing on prompts and padding
    expected = [0.0, -0.25, 1.25, 0.0, 0.0, -1.25, 0.25, 0.0]
    torch.testing.assert_close(derivatives, torch.tensor(expected))


@pytest.mark.parametrize("whitening", [None, Whitening(torch.tensor(0.3), torch.tensor(1.7))])
def test_gradients_come_from_the_loss_that_is_reported(whitening: Whitening | None):
    draw = np.random.default_rng(0)
    fields = {"logprobs": list(draw.normal(size=7)), "advantages": list(draw.normal(size=7))}
    batch = batch_of(fields)
    logprobs = torch.cat([batch.fields["logprobs"][:7], torch.zeros(1)])
    logprobs = logprobs + 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    loss = ClippedPolicyLoss(num_targets=torch.tensor(4.0), cliprange=0.2, whitening=whitening)
    reported = policy_metrics_of(loss, batch, logprobs)["policy_loss"]
    torch.testing.assert_close(losses_of(loss, batch, logprobs)[0].sum(), reported)


@pytest.mark.parametrize(("cliprange", "expected"), [(0.2, 0.5 * 0.8**2), (None, 0.5 * 0.5**2)])
def test_value_loss_by_hand(cliprange: float | None, expected: float):
    # One token moved from 0 to 0.5 on its way to 1: the clipped value 0.2 is the farther one.
    batch = batch_of({"values": [0.0] * 7, "returns": [0, 1.0, 0, 0, 0, 0, 0]})
    readings = torch.tensor([0.5, 0.0, 9.0, 9.0, 0.0, 0.0, 9.0, 9.0], requires_grad=True)
    loss, found = clipped_value_loss(torch.tensor(4.0), cliprange=cliprange)(batch, readings)
    assert loss.item() == pytest.approx(expected / 4)
    assert found["value_loss"].item() == pytest.approx(expected / 4)
    loss.backward()
    read = readings.grad.nonzero()[:, 0].tolist()
    assert read == ([] if cliprange else [0])  # flat where clipped
    assert found["return_moments"].tolist() == pytest.approx([4.0, 0.25, 0.75])


def comparisons() -> list[list[Example]]:
    """Three completions, the last two tied, and a pair."""
    draw = np.random.default_rng(0)

    def unit(ranks: tuple[int, ...]) -> list[Example]:
        return [
            Example(tokens=draw.integers(0, 100, 3 + rank), prompt_length=2, fields={"ranks": rank})
            for rank in ranks
        ]

    return [unit((1, 2, 2)), unit((2, 1))]


def test_comparison_loss_by_hand():
    batch = pack(comparisons(), multiple_of=8)
    scores = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.5])
    readings = torch.zeros(len(batch.tokens))
    readings[batch.cu_seqlens[1:6].long() - 1] = scores
    readings.requires_grad_()
    loss, found = comparison_loss(4)(batch, readings)

    def cost(difference: float) -> float:  # -log sigmoid
        return math.log1p(math.exp(-difference))

    # The first prompt has 2 pairs of C(3, 2) = 3: its tie makes none.
    expected = ((cost(1.0) + cost(-2.0)) / 3 + cost(0.0)) / 4
    assert loss.item() == pytest.approx(expected)
    assert found["num_pairs"].item() == 3
    assert found["num_correct"].item() == 1.5  # one right, one wrong, one equal
    assert found["score_sum"].item() == 5.0
    assert found["score_square_sum"].item() == 10.5
    assert found["num_scores"].item() == 5
    loss.backward()
    read = readings.grad.nonzero()[:, 0]
    assert read.tolist() == (batch.cu_seqlens[1:6] - 1).tolist()  # last tokens, no padding


def test_comparison_loss_of_a_filler_is_nothing(parallel: Parallel):
    rank = dataclasses.replace(parallel, dp=3, dp_rank=2)  # two comparisons for three ranks
    (filler,) = pack_for(comparisons()[:2], rank, 100)
    readings = torch.ones(len(filler.tokens), requires_grad=True)
    loss, found = comparison_loss(4)(filler, readings)
    loss.backward()
    assert loss.item() == 0.0
    assert (readings.grad == 0).all()
    assert found["num_scores"].item() == 0


def test_score_is_the_reading_at_the_last_token():
    batch = pack(comparisons(), multiple_of=1)
    readings = torch.arange(float(len(batch.tokens)))
    assert last_readings(readings, batch.cu_seqlens).tolist() == [3.0, 8.0, 13.0, 18.0, 22.0]


def test_held_out_losses_are_those_of_the_whole_and_leave_dropout_on(parallel: Parallel):
    network = random_network("language", parallel)
    network.train(True)
    draw = np.random.default_rng(0)
    units = [Example(tokens=draw.integers(0, 100, n), prompt_length=2) for n in (9, 30, 4)]
    found = [mean_language_loss(network, units, budget) for budget in (1, 32, 1000)]
    batch = pack(units, multiple_of=1)
    (logprobs,) = forward(network, [batch])
    assert found == pytest.approx([-logprobs[batch.mask].mean().item()] * 3, rel=1e-5)
    assert network.modules[0].training


def test_held_out_accuracy_is_that_of_the_whole(parallel: Parallel):
    network = random_network("scalar", parallel)
    units = comparisons()
    found = [pair_accuracy(network, units, budget) for budget in (1, 1000)]
    batch = pack(units, multiple_of=1)
    (readings,) = forward(network, [batch])
    loss, metrics = comparison_loss(2)(batch, readings)
    expected = (loss.item(), metrics["num_correct"].item() / 3)
    for pair in found:
        assert pair == pytest.approx(expected, rel=1e-5)


def test_held_out_accuracy_is_the_same_with_shared_prompts(parallel: Parallel):
    network = random_network("scalar", parallel)
    units = [
        [dataclasses.replace(each, tokens=np.append(unit[0].tokens[:2], each.tokens[2:]))
         for each in unit]
        for unit in comparisons()
    ]  # fmt: skip
    alone, *shared = (
        pair_accuracy(network, units, budget, share_prompts=share_prompts)
        for budget, share_prompts in ((100, False), (1, True), (100, True))
    )
    for pair in shared:
        assert pair == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mode", [False, True])
def test_evaluation_is_without_dropout_and_puts_the_mode_back(
    mode: bool, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
):
    modes = []

    def forward_and_look(network: Network, batches: list[PackedBatch]) -> list[torch.Tensor]:
        modes.append(network.modules[0].training)
        return forward(network, batches)

    monkeypatch.setattr("engine.losses.forward", forward_and_look)
    language, scalar = (random_network(kind, parallel) for kind in ("language", "scalar"))
    for network in (language, scalar):
        network.train(mode)
    mean_language_loss(language, [Example(tokens=np.arange(9), prompt_length=2)], 100)
    pair_accuracy(scalar, comparisons(), 100)
    assert modes == [False, False]
    assert language.modules[0].training is scalar.modules[0].training is mode
