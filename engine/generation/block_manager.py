"""Who holds which block of the key-value cache: allocation, sharing of prompts that begin alike.

A full block of a prompt is known by a digest of all tokens up to its end: sequences that begin
alike hold the same blocks, computed once and counted by reference. Shared blocks are full and never
written again, so nothing is ever copied.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockManager:
    """The blocks of one rank's cache; every rank of a replica keeps the same books."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        # Free blocks, those freed first in front. They keep their digest until they are given out
        # again: a prompt that comes back soon (its next sample, or a preempted one) finds them.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return the blocks that hold num_tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, now with one user each; KeyError when there are too few."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            digest = self._digest_of[block]
            if digest is not None:
                del self._block_of[digest]
                self._digest_of[block] = None
            self._num_users[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks known by the first digests, as far as they go, without taking them."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

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
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user off each block; those without any are free."""
        # Last block first: the beginnings of prompts are worth keeping longest.
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free[block] = None


def prefix_digests(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return a digest for every full block of tokens, over all tokens up to the block's end."""
    row = np.asarray(tokens, dtype=np.int64)
    digest = hashlib.blake2b(digest_size=16)
    digests = []
    for end in range(block_size, len(row) + 1, block_size):
        digest.update(row[end - block_size : end].tobytes())
        digests.append(digest.digest())
    return digests
