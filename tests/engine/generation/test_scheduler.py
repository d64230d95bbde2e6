import random
from collections import Counter, deque

import pytest

from engine.generation.block_manager import BlockManager
from engine.generation.scheduler import Counts, Scheduler
from engine.generation.sequence import LiveSequence

STOP = 0


def sequence(index: int, prompt: list[int], num_new: int = 8) -> LiveSequence:
    return LiveSequence(
        sample_index=index,
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_length=len(prompt) + num_new,
    )


def scheduler(sequences: list[LiveSequence], **changes) -> Scheduler:
    settings = {
        "blocks": BlockManager(64, 4),
        "slots_per_cohort": 8,
        "prefill_tokens": 64,
        "steps_per_sync": 1,
        "stop_ids": frozenset([STOP]),
        "num_cohorts": 1,
        "counts": Counts(),
    }
    return Scheduler(waiting=deque(sequences), **(settings | changes))


def draw(sequence: LiveSequence, position: int) -> int:
    """A token that depends on sequence and position alone; one in eight stops."""
    return random.Random(1000 * sequence.sample_index + position).randrange(8)


def outcome(step) -> list[tuple[list[int], list[float]]]:
    sampled = []
    for s in step.sampled:
        tokens = []
        for n in range(step.num_steps):
            tokens.append(draw(s, len(s.tokens) + n))
            if tokens[-1] == STOP or len(s.tokens) + len(tokens) == s.max_length:
                break
        sampled.append((tokens, [0.0] * len(tokens)))
    return sampled


def check_blocks(s: Scheduler) -> None:
    """Every block is free or has as many users as sequences hold it; what is written has room."""
    users = Counter(block for cohort in s.running for live in cohort for block in live.blocks)
    assert s.blocks.num_free + len(users) == len(s.blocks._num_users)
    assert all(s.blocks._num_users[block] == n for block, n in users.items())
    for cohort in s.running:
        for live in cohort:
            assert len(live.blocks) * s.blocks.block_size >= live.num_cached


def test_a_block_stays_free_for_each_that_runs_and_may_grow():
    first, second = sequence(0, [1, 2, 3, 4]), sequence(1, [5, 6, 7, 8])
    s = scheduler([first], blocks=BlockManager(3, 4))
    s.finish_step(0, s.next_step(0), [([9], [0.0])])
    s.waiting.append(second)  # one block is free when the first has its second, and may want it
    step = s.next_step(0)
    assert (step.decodes, step.prefills) == ([first], [])
    assert list(s.waiting) == [second]
    assert s.blocks.num_free == 1


@pytest.mark.parametrize("num_cohorts", [1, 3])
@pytest.mark.parametrize("steps_per_sync", [1, 5])
@pytest.mark.parametrize("num_blocks", [12, 20, 200])
def test_every_sequence_finishes_alike_whatever_the_room(num_cohorts, steps_per_sync, num_blocks):
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 50) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    prompts += prompts[:6]
    sequences = [sequence(index, prompt, 12) for index, prompt in enumerate(prompts)]
    s = scheduler(
        sequences,
        blocks=BlockManager(num_blocks, 4),
        slots_per_cohort=3,
        prefill_tokens=10,
        steps_per_sync=steps_per_sync,
        num_cohorts=num_cohorts,
    )
    flights = [None] * num_cohorts
    finished = []
    for _ in range(2000):
        if not s.has_work:
            break
        for cohort in range(num_cohorts):
            if flights[cohort] is not None:
                finished += s.finish_step(cohort, flights[cohort], outcome(flights[cohort]))
            flights[cohort] = s.next_step(cohort)
            check_blocks(s)
    assert len(finished) == len(sequences)
    assert s.blocks.num_free == num_blocks
    for live in finished:
        response = live.tokens[live.prompt_length :]
        expected = []
        while not expected or (expected[-1] != STOP and len(expected) < 12):
            expected.append(draw(live, live.prompt_length + len(expected)))
        assert response == expected
    if num_blocks == 12:
        assert s.counts.num_preempted > 0
    if num_blocks == 200:
        assert s.counts.num_preempted == 0


def test_a_long_prompt_is_fed_in_parts_next_to_decoding_sequences():
    s = scheduler([sequence(0, [1, 2]), sequence(1, list(range(1, 31)))], prefill_tokens=10)
    step = s.next_step(0)
    assert [(c.sequence.sample_index, c.start, c.stop) for c in step.prefills] == [
        (0, 0, 2),
        (1, 0, 8),
    ]
    assert [live.sample_index for live in step.sampled] == [0]
    s.finish_step(0, step, [([5], [0.0])])
    step = s.next_step(0)
    assert [live.sample_index for live in step.decodes] == [0]
    assert [(c.start, c.stop) for c in step.prefills] == [(8, 18)]
    assert step.num_steps == 1


def test_a_finished_slot_is_refilled_at_once():
    s = scheduler([sequence(index, [1, 2, 3]) for index in range(3)], slots_per_cohort=2)
    step = s.next_step(0)
    assert [live.sample_index for live in step.sampled] == [0, 1]
    s.finish_step(0, step, [([STOP], [0.0]), ([7], [0.0])])
    step = s.next_step(0)
    assert [live.sample_index for live in step.sampled] == [1, 2]


def test_equal_prompts_share_full_blocks_and_compute_only_the_rest():
    prompt = list(range(1, 12))  # two full blocks and three tokens
    s = scheduler([sequence(index, prompt) for index in range(3)])
    step = s.next_step(0)
    assert [(c.start, c.stop) for c in step.prefills] == [(0, 11), (8, 11), (8, 11)]
    first, second, third = s.running[0]
    assert first.blocks[:2] == second.blocks[:2] == third.blocks[:2]
    assert len({live.blocks[2] for live in s.running[0]}) == 3
    assert s.counts.num_shared == 16


def test_the_last_token_of_a_shared_prompt_is_always_computed():
    s = scheduler([sequence(index, [1, 2, 3, 4]) for index in range(2)])
    step = s.next_step(0)
    assert [(c.start, c.stop) for c in step.prefills] == [(0, 4), (0, 4)]


def test_several_steps_run_between_syncs_only_without_prompts_and_with_blocks():
    s = scheduler([sequence(0, [1, 2], num_new=30)], steps_per_sync=8, blocks=BlockManager(3, 4))
    step = s.next_step(0)
    assert step.num_steps == 1
    s.finish_step(0, step, [([5], [0.0])])
    assert s.next_step(0).num_steps == 8
    assert len(s.running[0][0].blocks) == 3  # for positions 2 to 9
