import pytest
import torch

from engine.errors import UserError
from engine.generation.cache import choose_cache, num_lanes, table_width
from engine.settings.sampling import SamplingConfig
from models.sizes import GPTSize

BLOCK_BYTES = 4 * 2 * 16 * 64 * 4  # layers x (keys, values) x tokens x width x fp32


def test_the_cache_is_no_larger_than_its_sequences_need(network):
    shape = choose_cache(network, SamplingConfig(), num_sequences=3, max_length=33)
    assert (shape.num_blocks, shape.blocks_per_sequence) == (9, 16)
    assert num_lanes(network) * shape.num_blocks * shape.block_bytes == 9 * BLOCK_BYTES
    lanes = [torch.full((9 * BLOCK_BYTES // 8,), 255, dtype=torch.uint8) for _ in range(8)]
    cache = shape.build(lanes)
    assert cache.layer(4)[0].shape == (9, 16, 4, 16)
    assert (torch.cat(lanes) == 0).all()
    assert cache.addresses == tuple(lane.data_ptr() for lane in lanes)


def test_the_cache_holds_heads_of_keys_and_no_more(network, monkeypatch):
    monkeypatch.setattr(GPTSize, "num_kv_heads", property(lambda self: 2))
    monkeypatch.setattr(GPTSize, "head_dim", property(lambda self: 24))
    config = SamplingConfig(cache_gib=1 / 2**10)
    shape = choose_cache(network, config, num_sequences=10**6, max_length=33)
    assert (shape.kv_heads, shape.dim) == (2, 24)
    taken = num_lanes(network) * shape.num_blocks * shape.block_bytes
    assert 2**20 - num_lanes(network) * shape.block_bytes < taken <= 2**20
    assert shape.block_bytes == 16 * 2 * 24 * 4  # tokens x heads x dimensions x fp32


def test_the_cache_is_no_larger_than_it_may_be(network):
    config = SamplingConfig(cache_gib=5.5 * BLOCK_BYTES / 2**30)
    assert choose_cache(network, config, num_sequences=3, max_length=33).num_blocks == 5


def test_a_cache_too_small_for_one_sequence_is_an_error(network):
    config = SamplingConfig(cache_gib=2 * BLOCK_BYTES / 2**30)
    with pytest.raises(UserError, match="room for 32 tokens, and one sequence may need 33"):
        choose_cache(network, config, num_sequences=3, max_length=33)


def test_what_lanes_are_rounded_up_to_is_left_free(network, monkeypatch):
    monkeypatch.setattr("engine.generation.cache.free_bytes", lambda device: 20 * BLOCK_BYTES)
    config, granularity = SamplingConfig(cache_fraction=1.0), BLOCK_BYTES // 4  # 2 blocks a lane
    shape = choose_cache(network, config, num_sequences=99, max_length=33, granularity=granularity)
    taken = -(-shape.num_blocks * shape.block_bytes // granularity) * granularity
    assert shape.num_blocks == 18
    assert num_lanes(network) * taken <= 20 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("max_length", "block_size", "width"),
    [(1, 16, 16), (256, 16, 16), (257, 16, 32), (600, 16, 64), (2048, 16, 128), (300, 100, 6)],
)
def test_block_tables_have_few_widths(max_length, block_size, width):
    assert table_width(max_length, block_size) == width
