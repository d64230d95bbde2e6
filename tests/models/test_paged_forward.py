"""What generation's forward pass asks of the other ranks, whatever training's layout is."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.generation.generate import generate
from engine.settings.layout import ParallelLayout
from engine.settings.sampling import SamplingConfig
from models.paged_forward import paged_embedding
from tests.engine.generation.random_gpt2 import VOCAB, load_gpt2, save_gpt2
from tests.ranks import run_ranks

NUM_LAYERS = 4
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextlib.contextmanager
def counted_collectives() -> Iterator[Counter]:
    """Count the calls of a block, by name."""
    counts: Counter = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            plain = getattr(dist, name)

            def call(*args, name=name, plain=plain, **named):
                counts[name] += 1
                return plain(*args, **named)

            patch.setattr(dist, name, call)
        yield counts


def collectives_of_steps(folder: Path) -> dict[bool, Counter]:
    """What eight greedy steps call beyond what one does, without and with sequence parallelism."""
    found = {}
    for is_sequence in (False, True):
        network = load_gpt2(folder, ParallelLayout(tp=2, sequence_parallel=is_sequence))
        counts = []
        for num_tokens in (1, 9):
            config = SamplingConfig(max_new_tokens=num_tokens, temperature=0.0)
            with counted_collectives() as counted:
                list(generate(network, [torch.arange(5).numpy()], config, eos_id=-1, seed=0))
            counts.append(counted)
        found[is_sequence] = counts[1] - counts[0]
    return found


def test_two_sums_a_layer_one_of_the_embedding_and_a_gathering_of_draws(tmp_path):
    save_gpt2(tmp_path)
    expected = {"all_reduce": 8 * (2 * NUM_LAYERS + 1), "all_gather_into_tensor": 8}
    for found in run_ranks(collectives_of_steps, 2, tmp_path):
        assert found == {False: expected, True: expected}


def embeddings(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(generation's, megatron's) [VOCAB, hidden size] of a vocabulary that two ranks share."""
    module = load_gpt2(folder, ParallelLayout(tp=2)).modules[0]
    tokens, positions = torch.arange(VOCAB), torch.arange(VOCAB) % 200
    with torch.no_grad():
        mine = paged_embedding(module.embedding, tokens, positions, module.pg_collection.tp)
        return mine[:, 0], module.embedding(tokens[None], positions[None])[:, 0]


def test_embeddings_are_megatrons_to_the_bit(tmp_path):
    save_gpt2(tmp_path)
    for mine, megatrons in run_ranks(embeddings, 2, tmp_path):
        assert torch.equal(mine, megatrons)
