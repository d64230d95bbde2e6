import dataclasses

import numpy as np
import pytest
import torch

from engine.data.batches import pack
from engine.data.examples import Example
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from models.packed_sequences import PackedSequences
from models.readouts import Logits, Readings
from tests.tiny import SIZE, random_network

LENGTHS = (64, 1, 23, 2)


@pytest.fixture
def parallel() -> Parallel:
    return start_parallel(ParallelLayout(), seed=1)


def sequences() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, SIZE.vocab_size, length) for length in LENGTHS]


def read(network: Network, tokens: list[np.ndarray]) -> torch.Tensor:
    batch = pack([Example(tokens=t, prompt_length=1) for t in tokens], multiple_of=1)
    packed = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
    return network.modules[0](batch.tokens, batch.positions, packed, Readings())


def test_head_is_drawn_with_std_one_over_root_d_plus_one(parallel: Parallel):
    size = dataclasses.replace(SIZE, hidden_size=4096, num_layers=1)
    network = build_network("scalar", size, parallel, numerics=Numerics())
    head = network.modules[0].scalar_head
    assert head.weight.shape == (1, 4096)
    assert head.weight.std().item() == pytest.approx(4097**-0.5, rel=0.04)
    assert head.bias.item() == 0.0


def test_head_is_the_same_whatever_stands_before_it(parallel: Parallel):
    heads = []
    for num_layers in (1, 4):
        size = dataclasses.replace(SIZE, num_layers=num_layers)
        network = build_network("scalar", size, parallel, numerics=Numerics())
        heads.append(network.modules[0].scalar_head.weight)
    assert torch.equal(*heads)


def test_readings_are_the_trunk_times_the_head(parallel: Parallel):
    scalar = random_network("scalar", parallel, seed=3)
    language = random_network("language", parallel, seed=4)
    (module,), (trunk,) = scalar.modules, language.modules
    # The hidden states are those of a language model with the same trunk.
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            parameter.copy_(own[name])
        found = read(scalar, sequences())
        hidden = []
        trunk.decoder.final_layernorm.register_forward_hook(
            lambda layer, inputs, output: hidden.append(output[:, 0])
        )
        batch = pack([Example(tokens=t, prompt_length=1) for t in sequences()], multiple_of=1)
        packed = PackedSequences.of(batch.cu_seqlens, batch.max_seqlen)
        trunk(batch.tokens, batch.positions, packed, Logits(torch.arange(3)))
    head = module.scalar_head
    expected = hidden[0] @ head.weight[0] + head.bias
    assert found.shape == (sum(LENGTHS),)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packing_changes_nothing_but_rounding(parallel: Parallel):
    network = random_network("scalar", parallel)
    together = read(network, sequences())
    one_by_one = torch.cat([read(network, [tokens]) for tokens in sequences()])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_a_reading_depends_on_its_token_and_those_before(parallel: Parallel):
    network = random_network("scalar", parallel)
    tokens = sequences()[0]
    before = read(network, [tokens])
    changed = tokens.copy()
    changed[40] = (changed[40] + 1) % SIZE.vocab_size
    after = read(network, [changed])
    assert torch.equal(before[:40], after[:40])
    assert (before[40:] != after[40:]).all()


def test_readings_are_fp32_whatever_the_weights(parallel: Parallel):
    network = random_network("scalar", parallel, dtype="bf16")
    assert read(network, sequences()).dtype is torch.float32
