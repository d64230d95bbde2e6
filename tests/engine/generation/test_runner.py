import pytest
import torch

from engine.generation.cache import num_lanes
from engine.generation.cache_memory import cache_memory
from engine.generation.decoding import Decoding
from engine.generation.generate import generate
from engine.generation.graphs import CudaGraph
from engine.generation.runner import graph_rows
from engine.generation.scheduler import Counts
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import build_network
from models.sizes import GPTSize
from tests.engine.generation.random_gpt2 import VOCAB, random_prompts
from tests.engine.generation.recorded import DoneAgain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_change_nothing_and_serve_the_next_rollouts(dtype):
    size = GPTSize(num_layers=4, hidden_size=256, num_heads=4, vocab_size=VOCAB, context_length=512)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("language", size, parallel, numerics=Numerics(dtype=dtype))
    for parameter in network.modules[0].parameters():
        parameter.data.normal_(std=0.1)
    prompts = random_prompts(40, 200)
    config = SamplingConfig(max_new_tokens=60, num_slots=24)
    # The same padded rows without graphs: cuBLAS has other kernels for other numbers of rows.
    found: dict[type, list[list]] = {DoneAgain: [], CudaGraph: []}
    for record, answers in found.items():
        memory = cache_memory(parallel.device, num_lanes=num_lanes(network))
        network.keep(Decoding(memory, record))
        kept: dict = {}
        for seed in (1, 2, 1):
            responses = list(generate(network, prompts, config, eos_id=0, seed=seed))
            responses.sort(key=lambda response: response.sample_index)
            answers.append([(r.tokens.tolist(), r.logprobs.tolist()) for r in responses])
            assert kept.items() <= network.decoding.graphs.items()
            kept = dict(network.decoding.graphs)
        assert answers[0] == answers[2] != answers[1]
    assert found[DoneAgain] == found[CudaGraph]


@pytest.mark.gpu
def test_a_rollout_gives_its_memory_back_and_keeps_its_graphs():
    size = GPTSize(num_layers=2, hidden_size=128, num_heads=2, vocab_size=VOCAB, context_length=256)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("language", size, parallel, numerics=Numerics(dtype="bf16"))
    config = SamplingConfig(max_new_tokens=30, num_slots=8)

    def free_bytes() -> int:
        list(generate(network, random_prompts(8, 20), config, eos_id=-1, seed=1))
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(parallel.device)[0]

    free = free_bytes()
    graphs = dict(network.decoding.graphs)
    assert graphs
    assert free_bytes() == free
    assert network.decoding.memory.lasts
    assert network.decoding.graphs == graphs


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


def test_graphs_have_few_numbers_of_rows():
    assert [graph_rows(n) for n in (1, 2, 3, 5, 9, 16, 17, 33, 256)] == [
        *(1, 2, 4, 8, 16, 16, 32, 48, 256)
    ]
    assert len({graph_rows(n) for n in range(1, 257)}) == 20
