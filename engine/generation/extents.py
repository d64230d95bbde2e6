"""Who holds which run of blocks, where the cache has room for every slot's longest sequence.

On the CPU, attention reads keys and values in half the time where they lie one after the other:
nothing has to be gathered first (kernels/decode_groups.py). So a sequence gets an extent when it is
admitted: consecutive blocks for the longest there is, and nobody is ever preempted. A prompt that
begins as one in another extent copies those blocks, once, and is not computed again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.generation.block_manager import Allotment, BlockCopy, PrefixNames, blocks_for
from engine.generation.sequence import LiveSequence


class ExtentManager:
    """Blocks that sequences hold by the extent, all of them from admission on (`Blocks`)."""

    def __init__(self, num_extents: int, extent_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.extent_blocks = extent_blocks
        # Freed first in front; they keep their names until they are given out again.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_extents))
        self._names = PrefixNames(num_extents * extent_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) * self.extent_blocks

    def allot(
        self, num_tokens: int, digests: Sequence[bytes], num_reserved: int
    ) -> Allotment | None:
        """Return an extent for a sequence of num_tokens, with what the digests know copied into it;
        None where none is free. num_reserved: nothing to an extent, which grows into itself."""
        if blocks_for(num_tokens, self.block_size) > self.extent_blocks:
            raise ValueError(f"{num_tokens} tokens exceed {self.extent_blocks} blocks")
        if not self._free:
            return None
        known = self._names.find(digests)
        count = len(known)
        # Whoever holds a prompt's n-th block holds those before it, even where they are known as
        # another's: one source is enough.
        source = known[-1] // self.extent_blocks if known else -1
        extent = source if source in self._free else next(iter(self._free))
        del self._free[extent]
        blocks = self._blocks(extent)
        if extent == source:  # the beginning lies where it belongs
            for block in blocks[count:]:
                self._names.forget(block)
            return Allotment(blocks=blocks, num_shared=count)
        for block in blocks:
            self._names.forget(block)
        if not known:
            return Allotment(blocks=blocks, num_shared=0)
        # The names go along: the last to come is likely the last to leave.
        for block, old, digest in zip(blocks, known, digests, strict=False):
            self._names.forget(old)
            self._names.add(block, digest)
        copy = BlockCopy(source * self.extent_blocks, blocks[0], count)
        return Allotment(blocks=blocks, num_shared=count, copy=copy)

    def num_missing(self, sequences: Iterable[LiveSequence], num_steps: int) -> int:
        """Return 0: every sequence has the blocks of its longest length."""
        return 0

    def allocate(self, count: int) -> list[int]:
        """Return nothing, as nothing is missing; ValueError where something is."""
        if count:
            raise ValueError(f"an extent does not grow, {count} blocks were asked for")
        return []

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable; of two with the same tokens the first stays known."""
        self._names.add(block, digest)

    def release(self, blocks: Sequence[int]) -> None:
        """Give an extent back, by its blocks."""
        extent = blocks[0] // self.extent_blocks
        if extent in self._free or list(blocks) != self._blocks(extent):
            raise ValueError(f"blocks {list(blocks)} are no extent in use")
        self._free[extent] = None

    def in_row_order(self, decodes: list[LiveSequence]) -> list[LiveSequence]:
        """Return decoding sequences as they lie in the cache, which is read from end to end."""
        return sorted(decodes, key=lambda sequence: sequence.blocks[0])

    def _blocks(self, extent: int) -> list[int]:
        start = extent * self.extent_blocks
        return list(range(start, start + self.extent_blocks))
