import pytest
import torch

from engine.config import UserError
from engine.generation.cache import build_cache, free_bytes
from engine.settings.sampling import SamplingConfig

BLOCK_BYTES = 4 * 2 * 16 * 64 * 4  # layers x (keys, values) x tokens x width x fp32


def test_the_cache_is_no_larger_than_its_sequences_need(network):
    cache = build_cache(network, SamplingConfig(), num_sequences=3, max_length=33)
    assert (cache.num_blocks, cache.blocks_per_sequence) == (9, 3)
    assert cache.layer(4)[0].shape == (9, 16, 4, 16)


def test_the_cache_is_no_larger_than_it_may_be(network):
    config = SamplingConfig(cache_gib=5.5 * BLOCK_BYTES / 2**30)
    assert build_cache(network, config, num_sequences=3, max_length=33).num_blocks == 5


def test_a_cache_too_small_for_one_sequence_is_an_error(network):
    config = SamplingConfig(cache_gib=2 * BLOCK_BYTES / 2**30)
    with pytest.raises(UserError, match="room for 32 tokens, and one sequence may need 33"):
        build_cache(network, config, num_sequences=3, max_length=33)


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
