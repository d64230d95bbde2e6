"""Who holds which block of the key-value cache: allocation, sharing of prompts that begin alike.

A full block of a prompt is known by a digest of all tokens up to its end: sequences that begin
alike hold the same blocks, computed once and counted by reference. Shared blocks are full and never
written again, so nothing is ever copied. (extents.py is the other way, for a CPU with room.)
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from engine.generation.sequence import LiveSequence


class BlockCopy(NamedTuple):
    """Consecutive blocks whose keys and values a step copies, in every layer."""

    source: int
    """The first block that is read."""
    target: int
    """The first that is written."""
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """The blocks that a sequence is admitted with."""

    blocks: list[int]
    num_shared: int
    """Blocks at the beginning whose keys and values are computed already."""
    copy: BlockCopy | None = None
    """What the sequence's first step copies into its blocks."""


class Blocks(Protocol):
    """Who holds which block of one rank's cache: all that the scheduler asks for and tells.

    Every rank of a replica keeps the same books.
    """

    block_size: int
    """Tokens."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""

    def allot(
        self, num_tokens: int, digests: Sequence[bytes], num_reserved: int
    ) -> Allotment | None:
        """Return blocks for a sequence of num_tokens, what the digests know among them; None where
        fewer than num_reserved would stay free."""

    def num_missing(self, sequences: Iterable[LiveSequence], num_steps: int) -> int:
        """Return the blocks that sequences lack to decode so many steps, all together."""

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, for a sequence that lacks them."""

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable; of two with the same tokens the first stays known."""

    def release(self, blocks: Sequence[int]) -> None:
        """Take a sequence's blocks back."""

    def in_row_order(self, decodes: list[LiveSequence]) -> list[LiveSequence]:
        """Return decoding sequences in the order of their rows; they come as they were admitted."""


class PrefixNames:
    """Which block holds the end of which beginning of a prompt."""

    def __init__(self, num_blocks: int) -> None:
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    def add(self, block: int, digest: bytes) -> None:
        """Make a full block findable; of two with the same tokens the first stays known."""
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, block: int) -> None:
        """Make a block unknown that is written anew."""
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks known by the first digests, as far as they go."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks


class BlockManager:
    """Blocks that sequences take one by one, as they grow (`Blocks`)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        # Free blocks, those freed first in front. They keep their digest until they are given out
        # again: a prompt that comes back soon (its next sample, or a preempted one) finds them.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._names = PrefixNames(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allot(
        self, num_tokens: int, digests: Sequence[bytes], num_reserved: int
    ) -> Allotment | None:
        """Return blocks for a sequence of num_tokens, those known by the digests shared; None where
        fewer than num_reserved would stay free."""
        shared = self.find(digests)
        num_new = blocks_for(num_tokens, self.block_size) - len(shared)
        if num_new + self.num_unused(shared) + num_reserved > self.num_free:
            return None
        self.take(shared)
        return Allotment(blocks=shared + self.allocate(num_new), num_shared=len(shared))

    def num_missing(self, sequences: Iterable[LiveSequence], num_steps: int) -> int:
        """Return the blocks that sequences lack to decode so many steps, all together; a prompt
        that is not all computed lacks none."""
        missing = 0
        for sequence in sequences:
            if sequence.num_pending == 1:
                length = min(sequence.num_cached + num_steps, sequence.max_length)
                num_blocks = blocks_for(length, self.block_size)
                missing += max(0, num_blocks - len(sequence.blocks))
        return missing

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, now with one user each; KeyError when there are too few."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._names.forget(block)
            self._num_users[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks known by the first digests, as far as they go, without taking them."""
        return self._names.find(digests)

    def num_unused(self, blocks: Sequence[int]) -> int:
        """Return how many of the blocks are free, so that taking them costs free blocks."""
        return sum(self._num_users[block] == 0 for block in blocks)

    def take(self, blocks: Sequence[int]) -> None:
        """Add a user to blocks that `find` returned."""
        for block in blocks:
            self._free.pop(block, None)
            self._num_users[block] += 1

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable; of two with the same tokens the first stays known."""
        self._names.add(block, digest)

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user off each block; those without any are free."""
        # Last block first: the beginnings of prompts are worth keeping longest.
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free[block] = None

    def in_row_order(self, decodes: list[LiveSequence]) -> list[LiveSequence]:
        """Return decoding sequences as they were admitted."""
        return decodes


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return the blocks that hold num_tokens."""
    return -(-num_tokens // block_size)


def prefix_digests(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return a digest for every full block of tokens, over all tokens up to the block's end."""
    row = np.asarray(tokens, dtype=np.int64)
    digest = hashlib.blake2b(digest_size=16)
    digests = []
    for end in range(block_size, len(row) + 1, block_size):
        digest.update(row[end - block_size : end].tobytes())
        digests.append(digest.digest())
    return digests
