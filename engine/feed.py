"""What a step learns from: this rank's micro-batches of a global batch, and the counts over it."""

from dataclasses import dataclass

from engine.data.batches import (
    Chosen,
    Cut,
    EpochOrder,
    PackedBatch,
    Units,
    deal,
    lengths_of,
    micro_batches,
    shapes_of,
    spread,
)
from engine.ranks.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One step's global batch: this rank's part of it, and numbers that are the same on all."""

    batches: list[PackedBatch]
    """This rank's micro-batches, on its device."""
    num_targets: int
    """Predicted tokens of the global batch: what its loss is divided by."""
    num_tokens: int
    """All its tokens, predicted or not: what the network processes."""
    spread: float
    """How unevenly data-parallel ranks share them: the most over the mean; 1 is even."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Examples dealt to steps, ranks and micro-batches; holds no position, so a resume needs only
    the step."""

    units: Units
    """Examples or comparisons, read on every rank alike."""
    batch_size: int
    """Units of a step's global batch; where there are fewer, each step takes all of them once. Our
    choice: what is twice in a batch teaches nothing more, and takes the time of two."""
    micro_batch_tokens: int
    """Token budget of one micro-batch on one rank."""
    seed: int
    """Shuffles the epochs."""
    parallel: Parallel
    share_prompts: bool = False
    """The prompt of a unit's sequences is laid out once; see engine/data/batches.pack."""

    @property
    def order(self) -> EpochOrder:
        """Which units each step takes."""
        num_units = len(self.units)
        return EpochOrder(num_units, min(self.batch_size, num_units), self.seed)

    def step(self, number: int) -> StepBatch:
        """Return what step `number`, counted from 0, learns from."""
        return step_batch(
            self.chosen(number),
            self.parallel,
            self.micro_batch_tokens,
            share_prompts=self.share_prompts,
        )

    def chosen(self, number: int) -> Chosen:
        """Return the units of that step's global batch."""
        return Chosen(self.units, self.order.indices(number))


def step_batch(
    units: Units, parallel: Parallel, micro_batch_tokens: int, *, share_prompts: bool = False
) -> StepBatch:
    """Return the global batch of these units, all of them; share_prompts: as Feed."""
    shapes = [shapes_of(units, index) for index in range(len(units))]
    lengths = lengths_of(shapes, share_prompts=share_prompts)
    dealt = deal(lengths, parallel.dp)
    return StepBatch(
        batches=pack_for(units, parallel, micro_batch_tokens, share_prompts=share_prompts),
        num_targets=sum(
            length - prompt_length for unit in shapes for length, prompt_length in unit
        ),
        num_tokens=sum(lengths),
        spread=spread([sum(lengths[index] for index in indices) for indices in dealt]),
    )


def pack_for(
    units: Units, parallel: Parallel, micro_batch_tokens: int, *, share_prompts: bool = False
) -> list[PackedBatch]:
    """Return this rank's part of the units as micro-batches on its device; share_prompts: as
    Feed."""
    layout = parallel.layout
    cut = Cut(
        dp=parallel.dp,
        dp_rank=parallel.dp_rank,
        # Sequence parallelism splits a rank's tokens evenly, context parallelism a row into 2 cp.
        multiple_of=(layout.tp if layout.sequence_parallel else 1)
        * (2 * layout.cp if layout.cp > 1 else 1),
        # The interleaved schedule walks micro-batches in groups of pp.
        count_multiple=layout.pp if layout.virtual_pp > 1 else 1,
        is_even=layout.pp > 1,
    )
    batches = micro_batches(units, cut, micro_batch_tokens, share_prompts=share_prompts)
    return [batch.to(parallel.device) for batch in batches]
