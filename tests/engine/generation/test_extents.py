import random
from collections import deque

import pytest

from engine.generation.block_manager import BlockCopy, prefix_digests
from engine.generation.extents import ExtentManager
from engine.generation.scheduler import Counts, Scheduler
from engine.generation.sequence import LiveSequence

SIZE = 2  # tokens of a block


def manager(num_extents: int = 3) -> ExtentManager:
    return ExtentManager(num_extents, 4, SIZE)


def place(extents: ExtentManager, tokens: list[int], reserved: int = 0):
    """Admit a prompt of full blocks, and name them as the step that computes them does."""
    digests = prefix_digests(tokens, SIZE)
    allotment = extents.allot(len(tokens), digests, reserved)
    if allotment is not None:
        for block, digest in zip(allotment.blocks, digests, strict=False):
            extents.name(block, digest)
    return allotment


def test_every_sequence_gets_a_run_as_long_as_the_longest():
    extents = manager()
    assert [place(extents, [n, n]).blocks for n in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert extents.num_free == 0
    assert place(extents, [7, 7]) is None


def test_extents_are_given_out_again_in_the_order_in_which_they_came_back():
    extents = manager(4)
    held = [place(extents, [n, n]).blocks for n in range(4)]
    for index in (2, 0, 3):
        extents.release(held[index])
    assert extents.num_free == 12
    again = [place(extents, [10 + n] * 2).blocks for n in range(3)]
    assert again == [held[2], held[0], held[3]]


def test_only_an_extent_in_use_comes_back():
    extents = manager()
    blocks = place(extents, [1, 2]).blocks
    with pytest.raises(ValueError, match="no extent"):
        extents.release(blocks[1:])
    extents.release(blocks)
    with pytest.raises(ValueError, match="no extent"):
        extents.release(blocks)


def test_a_prompt_that_exceeds_an_extent_is_an_error():
    with pytest.raises(ValueError, match="9 tokens exceed 4 blocks"):
        manager().allot(9, [], 0)


def test_an_extent_does_not_grow():
    assert manager().allocate(0) == []
    with pytest.raises(ValueError, match="does not grow, 1 blocks"):
        manager().allocate(1)


def test_a_prompt_in_another_extent_is_copied_once_and_known_by_the_copy():
    extents = manager()
    first = place(extents, [1, 2, 3, 4, 5, 6])
    second = place(extents, [1, 2, 3, 4, 9, 9])
    assert (first.num_shared, first.copy) == (0, None)
    assert (second.num_shared, second.copy) == (2, BlockCopy(0, 4, 2))
    extents.release(first.blocks)
    assert place(extents, [8, 8]).blocks == [8, 9, 10, 11]
    assert place(extents, [7, 7]).blocks == first.blocks  # which forgets what was in it
    extents.release([8, 9, 10, 11])
    third = place(extents, [1, 2, 3, 4, 5, 6])
    assert (third.num_shared, third.copy) == (2, BlockCopy(4, 8, 2))


def test_a_prompt_known_in_two_extents_has_one_source():
    extents = manager()
    place(extents, [1, 2, 3, 4, 5, 6])
    place(extents, [1, 2])  # its block is now known as the second's
    third = place(extents, [1, 2, 3, 4, 5, 6])
    assert (third.num_shared, third.copy) == (3, BlockCopy(0, 8, 3))


def test_a_free_extent_that_begins_alike_is_taken_as_it_is():
    extents = manager()
    first, second = place(extents, [1, 2, 3, 4, 5, 6]), place(extents, [7, 7])
    extents.release(second.blocks)
    extents.release(first.blocks)
    again = place(extents, [1, 2, 3, 4, 8, 8])
    assert (again.blocks, again.num_shared, again.copy) == (first.blocks, 2, None)
    other = place(extents, [1, 2, 3, 4, 5, 6])  # whose third block is written anew
    assert (other.num_shared, other.copy) == (2, BlockCopy(0, 8, 2))


def test_what_a_step_shares_is_what_the_cache_holds():
    """A cache of tokens in place of keys, written and copied as the steps say."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(1, 9) for _ in range(9)] for _ in range(3)]
    prompts = [
        rng.choice(beginnings)[: rng.randrange(1, 10)] + [rng.randrange(1, 9)] for _ in range(40)
    ]
    sequences = [
        LiveSequence(sample_index=n, tokens=list(p), prompt_length=len(p), max_length=len(p) + 4)
        for n, p in enumerate(prompts)
    ]
    s = Scheduler(
        waiting=deque(sequences),
        blocks=ExtentManager(4, 7, SIZE),
        slots_per_cohort=4,
        prefill_tokens=7,
        steps_per_sync=1,
        stop_ids=frozenset(),
        num_cohorts=1,
        counts=Counts(),
    )
    cache: dict[int, int] = {}  # slot -> token
    num_finished = num_copies = 0
    while s.has_work:
        step = s.next_step(0)
        assert step.decodes == sorted(step.decodes, key=lambda live: live.blocks[0])
        fed = [(live, live.num_cached, live.num_cached + 1) for live in step.decodes]
        fed += [(part.sequence, part.start, part.stop) for part in step.prefills]
        for live, start, stop in fed:
            for position in range(start, stop):
                slot = live.blocks[position // SIZE] * SIZE + position % SIZE
                cache[slot] = live.tokens[position]
        for source, target, count in step.copies:
            for offset in range(count * SIZE):
                cache[target * SIZE + offset] = cache[source * SIZE + offset]
        num_copies += len(step.copies)
        for live, _, stop in fed:
            start = live.blocks[0] * SIZE
            assert [cache[start + n] for n in range(stop)] == live.tokens[:stop]
        sampled = [([rng.randrange(1, 9)], [0.0]) for _ in step.sampled]
        num_finished += len(s.finish_step(0, step, sampled))
        held = [block for live in s.running[0] for block in live.blocks]
        assert len(held) == len(set(held))
        assert s.blocks.num_free + len(held) == 28
    assert num_finished == 40
    assert num_copies > 5
    assert s.counts.num_shared > 0
    assert s.counts.num_preempted == 0
