"""A network that trains has gradients that start at 0, and dropout; a frozen one has neither."""

import torch

from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.training.trainable import make_trainable
from tests.tiny import random_network


def test_network_gets_gradients_and_dropout_and_keeps_its_weights():
    network = random_network("language", start_parallel(ParallelLayout(), seed=0), dtype="bf16")
    (module,) = network.modules
    before = [p.detach().clone() for p in module.parameters()]
    assert not any(p.requires_grad for p in module.parameters()) and not module.training
    make_trainable(network)
    assert all(p.requires_grad for p in module.parameters()) and module.training
    gradients = [p.main_grad for p in module.parameters()]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert not any(g.any() for g in gradients)
    pairs = zip(before, module.parameters(), strict=True)
    assert all(torch.equal(weight, p) for weight, p in pairs)


def test_several_replicas_alone_overlap():
    layout = ParallelLayout(overlap_grad_reduce=True)
    network = random_network("scalar", start_parallel(layout, seed=0))
    make_trainable(network)
    (chunk,) = network.chunks
    assert not chunk.ddp_config.check_for_nan_in_grad  # the optimizer looks at the norm instead
    assert not chunk.ddp_config.average_in_collective and chunk.ddp_config.grad_reduce_in_fp32
