import dataclasses
import math

import numpy as np
import pytest
import torch

from engine.data.batches import PackedBatch, pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.passes import (
    Objective,
    _padded,
    _passes,
    accumulate,
    forward,
    forward_backward,
)
from engine.training.reduce import reduce_metrics
from engine.training.trainable import make_trainable
from models.packed_sequences import PackedSequences
from models.readouts import Readings
from tests.tiny import random_network

LENGTHS = (7, 30, 1, 12, 5)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(
            tokens=draw.integers(0, 100, length),
            prompt_length=min(2, length),
            fields={"weight": draw.random(length), "rank": index},
        )
        for index, length in enumerate(LENGTHS)
    ]


def one_batch() -> list[PackedBatch]:
    return [pack(examples(), multiple_of=1)]


def several_batches() -> list[PackedBatch]:
    """The same sequences two by two, with padding, and a micro-batch of nothing."""
    first, rest = examples()[:2], examples()[2:]
    empty = Example(
        tokens=np.zeros(4, dtype=np.int64),
        prompt_length=4,
        fields={"weight": np.zeros(4), "rank": 0},
    )
    return [pack(units, multiple_of=4) for units in (first, rest, [empty])]


def gradient(network: Network) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten() for p in network.modules[0].parameters()])


def weighted_square(batch: PackedBatch, readings: torch.Tensor):
    """A loss of a scalar network that looks at every token."""
    loss = (readings.square() * batch.fields["weight"]).sum()
    return loss, {
        "loss": loss.detach(),
        "reading_max": readings.max(),
        "reading_min": readings.min(),
    }


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_micro_batches_add_up(kind: str, parallel: Parallel):
    network = random_network(kind, parallel)
    make_trainable(network)
    loss = NegativeLogLikelihood(9) if kind == "language" else weighted_square
    found = []
    for batches in (one_batch(), several_batches()):
        network.chunks[0].zero_grad_buffer()
        metrics = forward_backward(network, batches, loss)
        found.append((gradient(network), reduce_metrics(metrics, parallel)["loss"]))
    (whole, whole_loss), (parts, parts_loss) = found
    assert whole.norm() > 0.1
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert math.isclose(parts_loss, whole_loss, rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_scale_multiplies_gradients_and_leaves_metrics(kind: str, parallel: Parallel):
    network = random_network(kind, parallel)
    make_trainable(network)
    loss = NegativeLogLikelihood(9) if kind == "language" else weighted_square
    plain = forward_backward(network, one_batch(), loss)
    before = gradient(network).clone()
    scaled = forward_backward(network, one_batch(), loss, scale=2.5)  # adds to the same buffers
    torch.testing.assert_close(gradient(network), 3.5 * before, rtol=1e-4, atol=1e-5)
    assert scaled["loss"] == plain["loss"]


def test_objectives_of_a_step_add_up_each_with_its_own_scale_and_temperature(parallel: Parallel):
    network = random_network("language", parallel)
    make_trainable(network)
    first, second = several_batches()[:1], several_batches()[1:]
    losses = NegativeLogLikelihood(9, "one_loss"), NegativeLogLikelihood(5, "other_loss")
    one = forward_backward(network, first, losses[0], temperature=0.5, scale=0.5)
    other = forward_backward(network, second, losses[1], scale=3.0)
    apart = gradient(network).clone()
    network.chunks[0].zero_grad_buffer()
    together = accumulate(
        network,
        [
            Objective(batches=first, loss=losses[0], temperature=0.5, scale=0.5),
            Objective(batches=second, loss=losses[1], scale=3.0),
        ],
    )
    assert torch.equal(gradient(network), apart)
    assert together == one | other


def objective_of_rows(*lengths: int) -> Objective:
    batches = [
        pack([Example(tokens=np.arange(n), prompt_length=1)], multiple_of=1) for n in lengths
    ]
    return Objective(batches=batches, loss=NegativeLogLikelihood(1))


@pytest.mark.parametrize(
    ("layout", "rows", "passes"),
    [
        # Rows of one length: (2 + 4 + 3) x 20 in one pass, (2 + 3) x 20 + (4 + 3) x 20 in two.
        (ParallelLayout(pp=4), [(20, 20), (20, 20, 20, 20)], [6]),
        # (2 + 3 + 1) x 40 in one pass, (2 + 1) x 10 + (3 + 1) x 40 in two: padding costs more.
        (ParallelLayout(pp=2), [(10, 10), (40, 40, 40)], [2, 3]),
        # (2 + 3 + 15) x 40 in one pass, (2 + 15) x 10 + (3 + 15) x 40 in two: filling costs more.
        (ParallelLayout(pp=16), [(10, 10), (40, 40, 40)], [5]),
        # (2 + 3 + 15 / 8) x 40 against (2 + 15 / 8) x 10 + (3 + 15 / 8) x 40: chunks fill faster.
        (ParallelLayout(pp=16, virtual_pp=8), [(10, 10), (40, 40, 40)], [2, 3]),
        (ParallelLayout(), [(10, 10), (40, 40, 40)], [5]),
    ],
)
def test_pipeline_is_filled_once_unless_padding_costs_more(
    layout: ParallelLayout, rows: list[tuple[int, ...]], passes: list[int]
):
    found = _passes([objective_of_rows(*lengths) for lengths in rows], layout)
    assert [len(work) for work in found] == passes


def overlapping_network(parallel: Parallel) -> Network:
    layout = ParallelLayout(overlap_grad_reduce=True)
    network = random_network("language", dataclasses.replace(parallel, layout=layout))
    make_trainable(network)
    return network


def test_reduction_starts_with_the_last_micro_batch_of_the_last_pass(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(  # as in a pipeline where one pass would be padded too much
        "engine.training.passes._passes",
        lambda objectives, layout: [[(batch, o) for batch in o.batches] for o in objectives],
    )
    plain, overlapping = random_network("language", parallel), overlapping_network(parallel)
    make_trainable(plain)
    (group,) = overlapping.chunks[0].bucket_groups
    seen: list[torch.Tensor] = []
    start = group.start_grad_sync

    def start_and_look(**arguments: bool) -> None:
        seen.append(gradient(overlapping).clone())
        start(**arguments)

    monkeypatch.setattr(group, "start_grad_sync", start_and_look)
    for numbers in ((2, 1), (3, 2), (1, 3)):  # of micro-batches, by objective
        objectives = [
            Objective(batches=several_batches()[:number], loss=NegativeLogLikelihood(9))
            for number in numbers
        ]
        for network in (plain, overlapping):
            network.chunks[0].zero_grad_buffer()
            accumulate(network, objectives)
        overlapping.chunks[0].finish_grad_sync()
        assert torch.equal(seen.pop(), gradient(plain))
        assert not seen


def test_gradients_that_are_being_reduced_take_no_more(parallel: Parallel):
    network = overlapping_network(parallel)
    loss = NegativeLogLikelihood(9)
    for _ in range(2):  # in the first step megatron only looks which gradients there are
        network.chunks[0].zero_grad_buffer()
        forward_backward(network, several_batches(), loss)
        with pytest.raises(RuntimeError, match="being reduced already"):
            forward_backward(network, several_batches(), loss)
        network.chunks[0].finish_grad_sync()
    network.chunks[0].zero_grad_buffer()
    forward_backward(network, several_batches(), loss)


def test_forward_returns_the_output_of_every_batch(parallel: Parallel):
    network = random_network("scalar", parallel)
    batches = several_batches()
    outputs = forward(network, batches)
    for batch, output in zip(batches, outputs, strict=True):
        sequences = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
        with torch.no_grad():
            expected = network.modules[0](batch.tokens, batch.positions, sequences, Readings())
        assert torch.equal(output, expected)
        assert not output.requires_grad


def test_temperature_divides_the_logits(parallel: Parallel):
    network = random_network("language", parallel)
    (cold,) = forward(network, one_batch(), temperature=0.5)
    with torch.no_grad():  # the head reads its weights once: doubled, they double the logits
        (module,) = network.modules
        normed = module.decoder.final_layernorm
        normed.weight *= 2
        normed.bias *= 2
    (doubled,) = forward(network, one_batch())
    torch.testing.assert_close(cold, doubled, rtol=1e-5, atol=1e-5)
    assert cold.min() < -2


def test_extremes_of_the_micro_batches_are_those_of_the_step(parallel: Parallel):
    network = random_network("scalar", parallel)
    make_trainable(network)
    batches = several_batches()
    outputs = torch.cat(forward(network, batches))
    metrics = forward_backward(network, batches, weighted_square)
    assert metrics["reading_max"] == pytest.approx(outputs.max().item())
    assert metrics["reading_min"] == pytest.approx(outputs.min().item())


def test_rows_padded_for_a_pipeline_say_the_same(parallel: Parallel):
    batch = several_batches()[0]
    num_tokens = len(batch.tokens)
    padded = _padded(batch, num_tokens + 71)  # more than one sequence of padding
    assert len(padded.tokens) == len(padded.positions) == len(padded.mask) == num_tokens + 71
    assert padded.cu_seqlens[-1] == num_tokens + 71
    assert padded.cu_seqlens.dtype == torch.int32
    assert padded.cu_seqlens.diff().max() == batch.max_seqlen  # no position beyond the context
    assert len(padded.sequence_ids) == len(padded.cu_seqlens) - 1 == len(padded.fields["rank"])
    assert len(padded.fields["weight"]) == num_tokens + 71
    assert torch.equal(padded.mask.nonzero()[:, 0], padded.targets)
    for kind in ("language", "scalar"):
        network = random_network(kind, parallel)
        (plain,), (longer,) = forward(network, [batch]), forward(network, [padded])
        torch.testing.assert_close(longer[:num_tokens], plain)
    assert _padded(batch, num_tokens) is batch


def test_loss_sees_the_batch_that_made_the_output(parallel: Parallel):
    network = random_network("scalar", parallel)
    make_trainable(network)
    seen = []

    def loss(batch: PackedBatch, readings: torch.Tensor):
        seen.append((batch, readings.detach()))
        return readings.sum(), {}

    batches = several_batches()
    forward_backward(network, batches, loss)
    for (_, output), expected in zip(seen, forward(network, batches), strict=True):
        torch.testing.assert_close(output, expected)
    assert [id(batch) for batch, _ in seen] == [id(batch) for batch in batches]
