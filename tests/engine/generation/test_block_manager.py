import pytest

from engine.generation.block_manager import BlockManager, prefix_digests
from engine.generation.sequence import LiveSequence


def test_released_blocks_are_given_out_again_oldest_first():
    manager = BlockManager(4, 16)
    first, second = manager.allocate(2), manager.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert manager.num_free == 0
    manager.release(second)
    manager.release(first)
    # A sequence's last blocks go first: its beginning may be wanted again.
    assert manager.allocate(4) == second[::-1] + first[::-1]


def test_too_few_free_blocks_are_an_error():
    with pytest.raises(KeyError):
        BlockManager(2, 16).allocate(3)


def test_sequences_that_decode_lack_blocks_up_to_their_limit_and_prompts_lack_none():
    manager = BlockManager(9, 2)
    prompt = LiveSequence(sample_index=0, tokens=[7, 8, 9], prompt_length=3, max_length=9)
    decoding = LiveSequence(
        sample_index=1, tokens=[7, 8, 9], prompt_length=2, max_length=6, blocks=[4], num_cached=2
    )
    lacks = [manager.num_missing([prompt, decoding], num_steps) for num_steps in (0, 1, 3, 99)]
    assert lacks == [0, 1, 2, 2]
    assert manager.num_missing([decoding] * 2, 3) == 4


def test_a_named_block_is_found_while_it_lives_and_until_it_is_reused():
    manager = BlockManager(3, 2)
    digests = prefix_digests([7, 8, 9, 10, 11], 2)
    blocks = manager.allocate(2)
    for block, digest in zip(blocks, digests, strict=True):
        manager.name(block, digest)
    assert manager.find(digests) == blocks
    manager.take(blocks)  # a second user
    manager.release(blocks)
    assert manager.num_free == 1
    manager.release(blocks)
    assert manager.num_free == 3
    assert manager.find(digests) == blocks
    assert manager.num_unused(blocks) == 2
    manager.take(blocks[:1])
    assert manager.num_free == 2
    manager.allocate(2)  # reuses the second block
    assert manager.find(digests) == blocks[:1]


def test_digests_depend_on_every_token_up_to_the_end_of_the_block():
    tokens = [1, 2, 3, 4, 5]
    assert len(prefix_digests(tokens, 2)) == 2
    assert prefix_digests(tokens, 2) == prefix_digests([*tokens[:4], 6], 2)
    other = prefix_digests([9, *tokens[1:]], 2)
    assert all(a != b for a, b in zip(prefix_digests(tokens, 2), other, strict=True))
