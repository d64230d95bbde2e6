import itertools
import math

import numpy as np
import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.residency.sharded import ShardedWeights
from engine.settings.layout import ParallelLayout
from engine.training.network import Kind, Network
from engine.training.passes import forward
from tests.ranks import run_ranks
from tests.tiny import random_network


def read(network: Network) -> torch.Tensor:
    """Return what a network makes of forty tokens, some of them twice."""
    tokens = np.arange(40) % 30
    batch = pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)
    (output,) = forward(network, [batch])
    return output.clone()


def sizes(network: Network) -> tuple[list[int], int]:
    """Return the parameters of each layer, and of all that lies outside of the layers."""
    (module,) = network.modules
    layers = [sum(p.numel() for p in layer.parameters()) for layer in module.decoder.layers]
    return layers, sum(p.numel() for p in module.parameters()) - sum(layers)


@pytest.mark.parametrize("kind", ["language", "scalar"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_have_memory_while_they_are_read_and_give_the_same_bits(
    kind: Kind, dtype: str, parallel: Parallel
):
    network = random_network(kind, parallel, dtype=dtype)
    expected = read(network)
    ShardedWeights(network, lambda: None)
    (module,) = network.modules
    for _ in range(2):
        assert sum(p.numel() for p in module.parameters()) == 0
        assert torch.equal(read(network), expected)
    assert sum(p.numel() for p in module.parameters()) == 0


def test_of_the_layers_two_at_a_time_are_gathered(parallel: Parallel):
    network = random_network("language", parallel)
    layers, ends = sizes(network)
    seen: list[int] = []
    shards = ShardedWeights(network, lambda: seen.append(shards.num_bytes))
    at_rest = shards.num_bytes
    assert at_rest == 4 * (sum(layers) + ends)  # of one rank, all of it
    gathered = []
    for layer in network.modules[0].decoder.layers:
        layer.mlp.register_forward_hook(lambda *_: gathered.append(shards.num_bytes - at_rest))
    read(network)
    *first, last = gathered
    assert first == [4 * (ends + one + after) for one, after in itertools.pairwise(layers)]
    assert last == 4 * (ends + layers[-1])
    assert seen == [at_rest + max(gathered)]  # it is told of the most at once
    assert shards.num_bytes == at_rest


def read_on_a_rank() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = random_network("language", parallel)
    layers, ends = sizes(network)
    # 4 bytes a number; every unit's parts are rounded up.
    half = 4 * sum(math.ceil(unit / 2) for unit in (*layers, ends))
    expected = read(network)
    shards = ShardedWeights(network, lambda: None)
    return expected, read(network), shards.num_bytes, half


@pytest.mark.slow  # test_residency.py's two ranks share a reference so, and are not
def test_two_ranks_keep_a_half_each():
    for expected, found, num_bytes, half in run_ranks(read_on_a_rank, 2):
        assert torch.equal(found, expected)
        assert num_bytes == half
