"""What the next step computes: who decodes, which parts of prompts, who comes in, who gives way."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.generation.block_manager import BlockCopy, Blocks, prefix_digests
from engine.generation.sequence import LiveSequence


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A part of a prompt, whose keys and values a step computes: tokens [start, stop)."""

    sequence: LiveSequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether it reaches the sequence's end, so that the next token is sampled."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One scheduling decision: what runs until the host looks again."""

    decodes: list[LiveSequence]
    """Sequences that feed their last token and sample the next, num_steps times."""
    prefills: list[Prefill]
    """Parts of prompts, several tokens each; where there are any, num_steps is 1."""
    num_steps: int
    copies: list[BlockCopy] = field(default_factory=list)
    """Blocks that every layer copies, in this order, before it reads the cache; where there are
    any, num_steps is 1."""

    @property
    def sampled(self) -> list[LiveSequence]:
        """The sequences that get tokens, in the order of the step's sampled rows."""
        return self.decodes + [part.sequence for part in self.prefills if part.is_last]


@dataclass(kw_only=True)
class Counts:
    """What generation did, for metrics and benchmarks; calls that share one add up."""

    num_steps: int = 0
    """Forward passes."""
    num_slot_steps: int = 0
    """Slots x forward passes: the room there was for tokens."""
    num_sampled: int = 0
    """Tokens that went into responses."""
    num_prefilled: int = 0
    """Tokens fed as prompts, those computed again after a preemption included."""
    num_shared: int = 0
    """Prompt tokens that were found in the cache instead."""
    num_preempted: int = 0
    """Times that a sequence gave its blocks back unfinished."""


@dataclass(kw_only=True)
class Scheduler:
    """Continuous batching over one block cache, for one or more cohorts: sequences that are stepped
    together.

    In a pipeline every stage works on another cohort's step, and a cohort is scheduled again when
    its last step is in. A block that one cohort gives back may be another's at once: every stage
    runs the steps in the same order.
    """

    waiting: deque[LiveSequence]
    blocks: Blocks
    slots_per_cohort: int
    prefill_tokens: int
    steps_per_sync: int
    stop_ids: frozenset[int]
    num_cohorts: int
    counts: Counts
    running: list[list[LiveSequence]] = field(init=False)
    """By cohort, in the order of admission."""

    def __post_init__(self) -> None:
        self.running = [[] for _ in range(self.num_cohorts)]

    @property
    def has_work(self) -> bool:
        """Whether some sequence is unfinished."""
        return bool(self.waiting) or any(self.running)

    def next_step(self, cohort: int) -> Step | None:
        """Return the cohort's next step, with blocks for all it writes; None if it has none."""
        running = self.running[cohort]
        num_steps = self._reserve_decodes(running)
        prefills: list[Prefill] = []
        copies: list[BlockCopy] = []
        left = self.prefill_tokens
        for sequence in running:
            left -= self._add_prefill(prefills, sequence, left)
        num_reserved = self._num_growing() if self.waiting else 0
        while left > 0 and len(running) < self.slots_per_cohort:
            admitted = self._admit_next(copies, num_reserved)
            if admitted is None:
                break
            running.append(admitted)
            num_reserved += self._may_grow(admitted)
            num_steps = 1  # it may decode at once, with room for one token
            left -= self._add_prefill(prefills, admitted, left)
        in_prefills = {id(part.sequence) for part in prefills}
        decodes = [s for s in running if s.num_pending == 1 and id(s) not in in_prefills]
        if not decodes and not prefills:
            return None
        step = Step(
            decodes=self.blocks.in_row_order(decodes),
            prefills=prefills,
            num_steps=1 if prefills else num_steps,
            copies=copies,
        )
        self.counts.num_steps += step.num_steps
        self.counts.num_slot_steps += step.num_steps * self.slots_per_cohort
        self.counts.num_prefilled += sum(part.stop - part.start for part in prefills)
        return step

    def finish_step(
        self, cohort: int, step: Step, sampled: Sequence[tuple[list[int], list[float]]]
    ) -> list[LiveSequence]:
        """Take in what a step sampled, (tokens, logprobs) for each of step.sampled.

        Returns the sequences that have finished.
        """
        for part in step.prefills:
            part.sequence.num_cached = part.stop
        finished = []
        for sequence, (tokens, logprobs) in zip(step.sampled, sampled, strict=True):
            sequence.extend(tokens, logprobs, self.stop_ids)
            sequence.num_cached = len(sequence.tokens) - 1
            self.counts.num_sampled += len(tokens)
            if sequence.is_finished:
                self._give_back(sequence)
                finished.append(sequence)
        if finished:
            self.running[cohort] = [s for s in self.running[cohort] if not s.is_finished]
        return finished

    def _reserve_decodes(self, running: list[LiveSequence]) -> int:
        """Give decoding sequences blocks for their next tokens; the last to come give way for it.

        Returns how many steps there are blocks for: steps_per_sync, or 1 when blocks are scarce.
        """
        room = [s.max_length - len(s.tokens) for s in running if s.num_pending == 1]
        num_steps = min(self.steps_per_sync, max(room, default=1))
        missing = self.blocks.num_missing(running, num_steps)
        if missing == 0:
            return num_steps
        if missing > self.blocks.num_free:
            num_steps = 1
        index = 0
        while index < len(running):
            sequence = running[index]
            missing = self.blocks.num_missing([sequence], num_steps)
            if missing > self.blocks.num_free:
                self._preempt(running.pop())  # perhaps the sequence itself
                continue
            sequence.blocks += self.blocks.allocate(missing)
            index += 1
        return num_steps

    def _preempt(self, sequence: LiveSequence) -> None:
        """Take a sequence's blocks; when its turn comes again it is fed as a longer prompt."""
        self._give_back(sequence)
        self.waiting.appendleft(sequence)
        self.counts.num_preempted += 1

    def _give_back(self, sequence: LiveSequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_cached = 0

    def _num_growing(self) -> int:
        """Return the sequences that run and may need one more block: so many stay free, or an
        admission would soon be undone."""
        return sum(self._may_grow(s) for running in self.running for s in running)

    def _may_grow(self, sequence: LiveSequence) -> bool:
        return len(sequence.blocks) * self.blocks.block_size < sequence.max_length

    def _admit_next(self, copies: list[BlockCopy], num_reserved: int) -> LiveSequence | None:
        """Return the first waiting sequence, now with blocks; None where its prompt's blocks and
        num_reserved more are not free. What the blocks are copied from goes into `copies`."""
        if not self.waiting:
            return None
        sequence, size = self.waiting[0], self.blocks.block_size
        if not sequence.digests:
            sequence.digests = prefix_digests(sequence.tokens, size)
        # At least the last token is computed: the next one is sampled from it.
        num_shareable = (len(sequence.tokens) - 1) // size
        digests = sequence.digests[:num_shareable]
        allotment = self.blocks.allot(len(sequence.tokens), digests, num_reserved)
        if allotment is None:
            return None
        self.waiting.popleft()
        sequence.blocks = allotment.blocks
        sequence.num_cached = allotment.num_shared * size
        if allotment.copy is not None:
            copies.append(allotment.copy)
        self.counts.num_shared += sequence.num_cached
        return sequence

    def _add_prefill(self, prefills: list[Prefill], sequence: LiveSequence, left: int) -> int:
        """Add a prompt's next part, of at most `left` tokens; return its tokens, 0 for others."""
        if sequence.num_pending == 1 or left <= 0:
            return 0
        start = sequence.num_cached
        stop = min(len(sequence.tokens), start + left)
        prefills.append(Prefill(sequence=sequence, start=start, stop=stop))
        # Whoever is scheduled after this may share the blocks: the step that fills them runs first,
        # and within a step every layer writes the cache before it reads it.
        size = self.blocks.block_size
        for n in range(start // size, stop // size):
            if n < len(sequence.digests):
                self.blocks.name(sequence.blocks[n], sequence.digests[n])
        return stop - start
