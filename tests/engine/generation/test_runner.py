import dataclasses

import numpy as np
import pytest
import torch

from engine.generation.generate import generate
from engine.generation.scheduler import Counts
from engine.network import build_network
from engine.parallel import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from models.sizes import GPTSize
from tests.engine.generation.random_gpt2 import VOCAB, random_prompts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_change_nothing(dtype):
    size = GPTSize(num_layers=4, hidden_size=256, num_heads=4, vocab_size=VOCAB, context_length=512)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=dtype))
    for parameter in network.modules[0].parameters():
        parameter.data.normal_(std=0.1)
    prompts = random_prompts(40, 200)
    config = SamplingConfig(max_new_tokens=60, num_slots=24)
    found = []
    for uses_graphs in (False, True):
        settings = dataclasses.replace(config, cuda_graphs=uses_graphs)
        found.append(
            {r.sample_index: r for r in generate(network, prompts, settings, eos_id=0, seed=1)}
        )
    for index, response in found[0].items():
        assert response.tokens.tolist() == found[1][index].tokens.tolist()
        assert np.allclose(response.logprobs, found[1][index].logprobs, atol=1e-5)


@pytest.mark.gpu
def test_decoding_never_waits_for_the_device(monkeypatch):
    size = GPTSize(num_layers=2, hidden_size=128, num_heads=2, vocab_size=VOCAB, context_length=256)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("language", size, parallel, numerics=Numerics(dtype="bf16"))
    counts, syncs = Counts(), []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: syncs.append(1) or plain(x))
    config = SamplingConfig(max_new_tokens=33, num_slots=8, steps_per_sync=8)
    list(generate(network, random_prompts(8, 20), config, eos_id=-1, seed=1, counts=counts))
    assert counts.num_steps == 33
    assert len(syncs) == 1 + 4  # the prompts, then eight steps at a time


def test_idle_rows_are_counted_as_room(network):
    counts = Counts()
    config = SamplingConfig(max_new_tokens=4, num_slots=2)
    prompts = random_prompts(3, 6)
    list(generate(network, prompts, config, eos_id=-1, seed=1, counts=counts))
    assert counts.num_sampled == 12
    assert (counts.num_steps, counts.num_slot_steps) == (8, 16)
    assert counts.num_prefilled + counts.num_shared >= sum(len(p) for p in prompts if len(p) > 1)
