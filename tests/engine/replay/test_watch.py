"""The first module and the first operation whose numbers are not finite are found."""

import math

import numpy as np
import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.losses import NegativeLogLikelihood
from engine.ranks.start import start_parallel
from engine.replay.watch import PassWatch
from engine.settings.layout import ParallelLayout
from engine.training.network import Network
from engine.training.passes import forward_backward
from engine.training.trainable import make_trainable
from tests.tiny import random_network


def watched(network: Network) -> PassWatch:
    make_trainable(network)
    tokens = np.random.default_rng(0).integers(0, 100, 40)
    batch = pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)
    watch = PassWatch(network)
    with watch.watching():
        forward_backward(network, [batch], NegativeLogLikelihood(39))
    return watch


@pytest.fixture
def network() -> Network:
    return random_network("language", start_parallel(ParallelLayout(), seed=1))


def test_sound_passes_have_no_finding_and_leave_no_hook(network: Network):
    watch = watched(network)
    assert watch.forward is None and watch.backward is None
    for module in network.modules[0].modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.word_embeddings", "VocabParallelEmbedding"),
        ("decoder.layers.1.self_attention.linear_qkv", "ColumnParallelLinear"),
        ("decoder.layers.3.mlp.linear_fc2", "RowParallelLinear"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_module_of_a_planted_weight_is_found(name: str, kind: str, value: float, network: Network):
    with torch.no_grad():
        weight = network.modules[0].get_submodule(name).weight
        weight[: len(weight) // 2, 0] = value
    found = watched(network).forward
    assert found is not None and found.spot == f"{name} ({kind})" and found.term == "loss"
    assert "numbers are not finite, the largest other is" in found.numbers


def test_what_overflows_between_modules_is_found_where_it_enters_one(network: Network):
    inner = network.modules[0].decoder.layers[2].mlp.linear_fc2
    inner.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1e39, *arguments[1:]))
    found = watched(network).forward
    assert found is not None
    assert found.spot == "what enters decoder.layers.2.mlp.linear_fc2 (RowParallelLinear)"


def test_rows_of_a_finding_are_the_tokens_that_are_not_finite(network: Network):
    weight = network.modules[0].get_submodule("embedding.position_embeddings").weight
    with torch.no_grad():
        weight[7, 0] = weight[11, 1] = math.nan
    found = watched(network).forward
    assert found is not None and found.rows == (7, 11) and found.num_rows == 40


def test_a_bias_that_is_not_finite_has_no_rows(network: Network):
    linear = network.modules[0].decoder.layers[1].mlp.linear_fc1
    with torch.no_grad():
        linear.bias[2] = math.nan
    found = watched(network).forward
    assert found is not None and "decoder.layers.1.mlp.linear_fc1" in found.spot
    assert found.rows == () and found.num_rows == 0


def test_operation_is_found_with_the_line_that_called_it(network: Network):
    make_trainable(network)
    watch = PassWatch(network)
    with watch.watching():
        x = torch.zeros(3, requires_grad=True)
        y = (x + 1.0).sqrt() - 1.0
        z = y.sqrt() * 0.0  # whose derivative at 0 is 0 x inf
        watch.follow(z)
        z.sum().backward()
    assert watch.forward is None and watch.backward is not None
    assert watch.backward.spot.startswith("SqrtBackward0 of tests/engine/replay/test_watch.py:")
    assert watch.backward.numbers.startswith("3 of 3 numbers")
