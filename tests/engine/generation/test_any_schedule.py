"""Whatever comes, in whatever order, with however much room: schedules against a simple model.

The model runs each step when it is decided, as every stage of a pipeline does, and keeps in place
of a token's keys and values what those depend on: the tokens up to it.
"""

import random
from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.generation.block_manager import BlockManager, blocks_for
from engine.generation.extents import ExtentManager
from engine.generation.scheduler import Counts, Scheduler, Step
from engine.generation.sequence import LiveSequence
from tests.fuzzing import proved

STOP = 0
MOST_ROUNDS = 3000  # in which all that was submitted has to end


def drawn(sample_index: int, position: int) -> int:
    """A token that depends on sequence and position alone; one in nine stops."""
    return random.Random(1000 * sample_index + position).randrange(9)


def response_of(sequence: LiveSequence) -> list[int]:
    """All tokens that a sequence is to get."""
    positions = range(sequence.prompt_length, sequence.max_length)
    tokens = [drawn(sequence.sample_index, position) for position in positions]
    return tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens


def next_of(sequence: LiveSequence, num_tokens: int) -> list[int]:
    """The next tokens that it is to get."""
    num_told = len(sequence.tokens) - sequence.prompt_length
    return response_of(sequence)[num_told : num_told + num_tokens]


class Generation(RuleBasedStateMachine):
    """Prompts that come at any time, and cohorts that step in any order."""

    @initialize(data=st.data(), has_extents=st.booleans())
    def begin(self, data, has_extents):
        def draw(fewest: int, most: int) -> int:
            return data.draw(st.integers(fewest, most))

        self.size, self.longest = draw(1, 4), draw(2, 24)
        slots, num_cohorts = draw(1, 4), draw(1, 3)
        per_sequence = blocks_for(self.longest, self.size)
        if has_extents:
            num_extents = slots * num_cohorts
            self.num_blocks = num_extents * per_sequence
            blocks = ExtentManager(num_extents, per_sequence, self.size)
        else:
            self.num_blocks = per_sequence + draw(0, 12)
            blocks = BlockManager(self.num_blocks, self.size)
        self.shares = not has_extents
        self.scheduler = Scheduler(
            waiting=deque(),
            blocks=blocks,
            slots_per_cohort=slots,
            prefill_tokens=draw(1, 12),
            steps_per_sync=draw(1, 5),
            stop_ids=frozenset([STOP]),
            num_cohorts=num_cohorts,
            counts=Counts(),
        )
        self.submitted: list[LiveSequence] = []
        self.prompts: list[list[int]] = []
        self.finished: list[LiveSequence] = []
        self.flights: list[Step | None] = [None] * num_cohorts
        self.cache: dict[int, tuple[int, ...]] = {}

    @rule(data=st.data(), beginning=st.integers(0, 5), keep=st.integers(0, 24))
    def submit(self, data, beginning, keep):
        """A prompt of its own, or one that begins as one of those before."""
        room = self.longest - 1
        kept = self.prompts[-1 - beginning][:keep] if beginning < len(self.prompts) else []
        kept = kept[:room]
        rest = data.draw(st.lists(st.integers(1, 3), max_size=room - len(kept)))
        prompt = (kept + rest) or [1]
        most = data.draw(st.integers(len(prompt) + 1, self.longest))
        sequence = LiveSequence(
            sample_index=len(self.submitted),
            tokens=list(prompt),
            prompt_length=len(prompt),
            max_length=most,
        )
        self.prompts.append(prompt)
        self.submitted.append(sequence)
        self.scheduler.waiting.append(sequence)

    @rule(number=st.integers(0, 2))
    def decide(self, number):
        cohort = number % len(self.flights)
        if self.flights[cohort] is not None:
            return
        queue = list(self.scheduler.waiting)
        counted = self.scheduler.counts.num_preempted
        was_running = list(self.scheduler.running[cohort])
        step = self.scheduler.next_step(cohort)
        self.flights[cohort] = step
        running = self.scheduler.running[cohort]
        # Who gives way came last and goes to the front; who comes in was the first to wait.
        num_gone = self.scheduler.counts.num_preempted - counted
        stayed = len(was_running) - num_gone
        assert running[:stayed] == was_running[:stayed]
        queue = was_running[stayed:] + queue
        came = len(running) - stayed
        assert running[stayed:] == queue[:came]
        assert list(self.scheduler.waiting) == queue[came:]
        if step is not None:
            self.run(step)

    def run(self, step: Step) -> None:
        assert 1 <= step.num_steps <= self.scheduler.steps_per_sync
        assert step.num_steps == 1 or not (step.prefills or step.copies)
        assert (
            sum(part.stop - part.start for part in step.prefills) <= self.scheduler.prefill_tokens
        )
        in_step = step.decodes + [part.sequence for part in step.prefills]
        assert len({id(each) for each in in_step}) == len(in_step)
        written: list[tuple[LiveSequence, list[int], int]] = []
        for part in step.prefills:
            assert part.start == part.sequence.num_cached < part.stop <= len(part.sequence.tokens)
            written.append((part.sequence, part.sequence.tokens, part.start))
            self.write(part.sequence, part.sequence.tokens, part.start, part.stop)
        for live in step.decodes:
            assert live.num_cached == len(live.tokens) - 1
            tokens = live.tokens + next_of(live, step.num_steps)
            self.write(live, tokens, live.num_cached, len(tokens) - 1)
            written.append((live, tokens[:-1], live.num_cached))
        for source, target, count in step.copies:
            for offset in range(count * self.size):
                self.cache[target * self.size + offset] = self.cache[source * self.size + offset]
        for part in step.prefills:
            self.check_cache(part.sequence, part.sequence.tokens, part.stop)
        for live, tokens, _ in written[len(step.prefills) :]:
            self.check_cache(live, tokens, len(tokens))

    def write(self, live: LiveSequence, tokens: list[int], start: int, stop: int) -> None:
        for position in range(start, stop):
            self.cache[self.slot(live, position)] = tuple(tokens[: position + 1])

    def slot(self, live: LiveSequence, position: int) -> int:
        return live.blocks[position // self.size] * self.size + position % self.size

    def check_cache(self, live: LiveSequence, tokens: list[int], stop: int) -> None:
        for position in range(stop):
            assert self.cache[self.slot(live, position)] == tuple(tokens[: position + 1])

    @rule(number=st.integers(0, 2))
    def end(self, number):
        cohort = number % len(self.flights)
        step = self.flights[cohort]
        if step is None:
            return
        self.flights[cohort] = None
        told = [next_of(sequence, step.num_steps) for sequence in step.sampled]
        sampled = [(tokens, [0.5 * token for token in tokens]) for tokens in told]
        ended = self.scheduler.finish_step(cohort, step, sampled)
        assert all(each.is_finished and not each.blocks for each in ended)
        self.finished += ended

    def num_decided(self, sequence: LiveSequence) -> int:
        """Return the tokens of a sequence whose keys are in the cache, or will be when the step
        that is under way has ended."""
        parts = [part for step in self.flights if step for part in step.prefills]
        stops = [part.stop for part in parts if part.sequence is sequence]
        return stops[0] if stops else sequence.num_cached

    @invariant()
    def every_sequence_is_in_one_place(self):
        if not hasattr(self, "scheduler"):
            return
        running = [each for cohort in self.scheduler.running for each in cohort]
        there = [*self.scheduler.waiting, *running, *self.finished]
        assert sorted(each.sample_index for each in there) == list(range(len(self.submitted)))
        assert all(
            len(cohort) <= self.scheduler.slots_per_cohort for cohort in self.scheduler.running
        )
        for each in self.submitted:
            told = each.tokens[each.prompt_length :]
            assert each.tokens[: each.prompt_length] == self.prompts[each.sample_index]
            assert told == response_of(each)[: len(told)]
            assert each.logprobs == [0.5 * token for token in told]
        assert not any(each.blocks or each.num_cached for each in self.scheduler.waiting)

    @invariant()
    def every_block_is_free_or_held(self):
        if not hasattr(self, "scheduler"):
            return
        running = [each for cohort in self.scheduler.running for each in cohort]
        users = Counter(block for each in running for block in each.blocks)
        assert self.scheduler.blocks.num_free + len(users) == self.num_blocks
        assert set(users) <= set(range(self.num_blocks))
        for each in running:
            assert len(set(each.blocks)) == len(each.blocks)
            assert len(each.blocks) * self.size >= each.num_cached
            # What will be written is its own.
            for block in each.blocks[self.num_decided(each) // self.size :]:
                assert users[block] == 1
            if not self.shares:
                assert all(users[block] == 1 for block in each.blocks)

    def teardown(self):
        """Nobody starves: with nothing more to come, all end, each with what it was to get."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(MOST_ROUNDS):
            if not self.scheduler.has_work:
                break
            for cohort in range(len(self.flights)):
                self.decide(cohort)
                self.every_block_is_free_or_held()
            assert any(self.flights), "nothing runs, and something waits"
            for cohort in range(len(self.flights)):
                self.end(cohort)
                self.every_sequence_is_in_one_place()
        assert not self.scheduler.has_work
        assert len(self.finished) == len(self.submitted)
        assert self.scheduler.blocks.num_free == self.num_blocks
        for each in self.finished:
            assert each.tokens[each.prompt_length :] == response_of(each)
        counts = self.scheduler.counts
        assert counts.num_sampled == sum(len(response_of(each)) for each in self.submitted)
        if not self.shares:
            assert counts.num_preempted == 0


TestGeneration = Generation.TestCase
TestGeneration.settings = settings(proved, stateful_step_count=40)
