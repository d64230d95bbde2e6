"""What a stage reads each step: this rank's micro-batches of a global batch that the step number
names."""

from dataclasses import dataclass

from engine.data.batches import EpochOrder, PackedBatch, Units, deal, micro_batches, shapes_of
from engine.ranks.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Examples dealt to steps, ranks and micro-batches; holds no position, so a resume needs only
    the step."""

    units: Units
    """Examples or comparisons, read on every rank alike."""
    batch_size: int
    """Units of a step's global batch."""
    micro_batch_tokens: int
    """Token budget of one micro-batch on one rank."""
    seed: int
    """Shuffles the epochs."""
    parallel: Parallel

    @property
    def order(self) -> EpochOrder:
        """Which units each step takes."""
        return EpochOrder(len(self.units), self.batch_size, self.seed)

    def batches(self, step: int) -> list[PackedBatch]:
        """Return this rank's micro-batches of a step, on its device."""
        return pack_for(
            self.units, self.order.indices(step), self.parallel, self.micro_batch_tokens
        )

    def num_targets(self, step: int) -> int:
        """Return the predicted tokens of a step's global batch."""
        return count_targets(self.units, self.order.indices(step))

    def num_tokens(self, step: int) -> int:
        """Return all tokens of a step's global batch, predicted or not: what the network
        processes."""
        return sum(_lengths(self.units, self.order.indices(step)))

    def token_spread(self, step: int) -> float:
        """Return how evenly a step's tokens are dealt; see token_spread."""
        return token_spread(self.units, self.order.indices(step), self.parallel.dp)


def pack_for(
    units: Units, indices: list[int], parallel: Parallel, micro_batch_tokens: int
) -> list[PackedBatch]:
    """Return this rank's share of the named units as micro-batches on its device."""
    layout = parallel.layout
    batches = micro_batches(
        units,
        indices,
        dp=parallel.dp,
        dp_rank=parallel.dp_rank,
        budget=micro_batch_tokens,
        # Sequence parallelism splits a rank's tokens evenly, context parallelism a row into 2 cp.
        multiple_of=(layout.tp if layout.sequence_parallel else 1)
        * (2 * layout.cp if layout.cp > 1 else 1),
        # The interleaved schedule walks micro-batches in groups of pp.
        count_multiple=layout.pp if layout.virtual_pp > 1 else 1,
        is_even=layout.pp > 1,
    )
    return [batch.to(parallel.device) for batch in batches]


def count_targets(units: Units, indices: list[int]) -> int:
    """Return how many tokens the named units predict."""
    return sum(
        num_tokens - prompt_length
        for index in indices
        for num_tokens, prompt_length in shapes_of(units, index)
    )


def token_spread(units: Units, indices: list[int], dp: int) -> float:
    """Return the tokens of the data-parallel rank that was dealt most over their mean: 1 is even,
    and what is above it the others wait for."""
    lengths = _lengths(units, indices)
    loads = [sum(lengths[i] for i in deal(lengths, dp, rank)) for rank in range(dp)]
    return max(loads) * dp / sum(loads)


def _lengths(units: Units, indices: list[int]) -> list[int]:
    """The tokens of the named units."""
    return [sum(num_tokens for num_tokens, _ in shapes_of(units, i)) for i in indices]
