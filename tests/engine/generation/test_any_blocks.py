"""Whoever takes and gives back blocks, extents and lanes, in whatever order: their books against a
simple model."""

import contextlib
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from engine.generation import lasting_memory
from engine.generation.block_manager import BlockManager, blocks_for, prefix_digests
from engine.generation.cache_memory import PassingMemory
from engine.generation.extents import ExtentManager
from engine.generation.lasting_memory import LastingMemory
from tests.fuzzing import proved

SIZE = 2  # tokens of a block
# Most begin alike.
PROMPTS = st.builds(
    lambda length, rest: ([1] * length + rest)[:9] or [2],
    st.sampled_from([0, 4, 8, 9]),
    st.lists(st.integers(1, 2), max_size=5),
)


class Holders(RuleBasedStateMachine):
    """Prompts that come, are computed, grow and go. The model is a dict: by block, who holds it and
    which beginning of a prompt is known to lie in it."""

    held = Bundle("held")

    @initialize(num_blocks=st.integers(5, 16), has_extents=st.booleans())
    def begin(self, num_blocks, has_extents):
        self.extent = 5 if has_extents else 0  # blocks of nine tokens
        if has_extents:
            num_blocks = num_blocks // 5 * 5
            self.blocks = ExtentManager(num_blocks // 5, 5, SIZE)
        else:
            self.blocks = BlockManager(num_blocks, SIZE)
        self.num_blocks = num_blocks
        self.holders: dict[int, list[int]] = {block: [] for block in range(num_blocks)}
        self.content: dict[int, bytes | None] = dict.fromkeys(range(num_blocks))
        self.sequences: dict[int, list[int]] = {}
        self.num_begun = 0

    @rule(target=held, tokens=PROMPTS, reserved=st.integers(0, 3))
    def admit(self, tokens, reserved):
        digests = prefix_digests(tokens, SIZE)
        was_free = {block for block, users in self.holders.items() if not users}
        found = self.blocks.allot(len(tokens), digests, reserved)
        if found is None:
            needed = self.extent or blocks_for(len(tokens), SIZE) + reserved
            assert len(was_free) < needed, "there was room"
            assert not self.extent or not was_free
            return multiple()
        assert len(found.blocks) == (self.extent or blocks_for(len(tokens), SIZE))
        assert len(set(found.blocks)) == len(found.blocks)
        shared, new = found.blocks[: found.num_shared], found.blocks[found.num_shared :]
        if found.copy is not None:
            source = range(found.copy.source, found.copy.source + found.copy.num_blocks)
            assert found.copy.num_blocks == found.num_shared
            assert found.copy.target == found.blocks[0]
            assert not set(source) & set(found.blocks)
            for block, original in zip(shared, source, strict=True):
                self.content[block] = self.content[original]
            new = [*shared, *new]
        # What is shared holds the prompt's beginning; what is new was nobody's.
        assert [self.content[block] for block in shared] == digests[: found.num_shared]
        assert set(new) <= was_free
        for block in found.blocks[found.num_shared :]:
            self.content[block] = None
        number = self.num_begun
        self.num_begun += 1
        self.sequences[number] = list(found.blocks)
        for block in found.blocks:
            self.holders[block].append(number)
        free = sum(not users for users in self.holders.values())
        assert self.extent or free >= reserved
        # It is computed: from now on others find it.
        for block, digest in zip(
            found.blocks[found.num_shared :], digests[found.num_shared :], strict=False
        ):
            self.blocks.name(block, digest)
            self.content[block] = digest
        return number

    @rule(number=held, count=st.integers(1, 4))
    def grow(self, number, count):
        if self.extent:
            with pytest.raises(ValueError, match="does not grow"):
                self.blocks.allocate(count)
            return
        free = {block for block, users in self.holders.items() if not users}
        if number not in self.sequences or count > len(free):
            return
        for block in self.blocks.allocate(count):
            assert block in free
            free.discard(block)
            self.holders[block].append(number)
            self.sequences[number].append(block)
            self.content[block] = None

    @rule(number=consumes(held))
    def leave(self, number):
        if number not in self.sequences:
            return
        blocks = self.sequences.pop(number)
        self.blocks.release(blocks)
        for block in blocks:
            self.holders[block].remove(number)

    @invariant()
    def free_and_held_are_all(self):
        if hasattr(self, "blocks"):
            users = Counter(block for blocks in self.sequences.values() for block in blocks)
            assert {b: len(u) for b, u in self.holders.items() if u} == users
            assert self.blocks.num_free == self.num_blocks - len(users)

    def teardown(self):
        if hasattr(self, "blocks"):
            for number in list(self.sequences):
                self.leave(number)
            assert self.blocks.num_free == self.num_blocks
            if not self.extent:  # and each can be had, once
                assert sorted(self.blocks.allocate(self.num_blocks)) == list(range(self.num_blocks))


TestHolders = Holders.TestCase
TestHolders.settings = settings(
    proved, max_examples=5 * proved.max_examples, stateful_step_count=40
)


class Driver:
    """Stands for CUDA's: books of what is mapped, and room for so many bytes."""

    room = 0

    def __init__(self, device: torch.device) -> None:
        self.mapped: dict[int, int] = {}

    def granularity(self) -> int:
        return 64

    def reserve(self, num_bytes: int) -> int:
        self.addresses = range(4096, 4096 + num_bytes)
        return 4096

    def free(self, address: int, num_bytes: int) -> None:
        assert not self.mapped

    def map(self, address: int, num_bytes: int) -> None:
        if sum(self.mapped.values()) + num_bytes > Driver.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert address in self.addresses and address + num_bytes - 1 in self.addresses
        assert address % 64 == num_bytes % 64 == 0
        for start, length in self.mapped.items():
            assert start + length <= address or address + num_bytes <= start
        self.mapped[address] = num_bytes

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self.mapped.pop(address) == num_bytes


class Lanes(RuleBasedStateMachine):
    """Rollouts that take lanes of any length and give them back, while others take the device's
    memory: it is held or not at all, and always at the same addresses."""

    @initialize(num_lanes=st.integers(1, 5), total=st.integers(64, 4000))
    def begin(self, num_lanes, total):
        self.patch = pytest.MonkeyPatch()
        properties = type("Properties", (), {"total_memory": total})
        self.patch.setattr(lasting_memory, "_Driver", Driver)
        for name in ("synchronize", "empty_cache"):
            self.patch.setattr(torch.cuda, name, lambda *_: None)
        self.patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        self.patch.setattr(torch, "as_tensor", lambda lane, device: lane.__cuda_array_interface__)
        self.num_lanes, self.total = num_lanes, total
        Driver.room = total + 64  # to be seen to support mapping takes a granule
        self.memory = LastingMemory(torch.device("cuda", 0), num_lanes=num_lanes)
        self.addresses: list[int] = []
        self.taken = 0

    @rule(num_bytes=st.integers(1, 1200), others=st.integers(0, 2000))
    def take(self, num_bytes, others):
        Driver.room = max(0, self.total - others)
        size = -(-num_bytes // 64) * 64
        if self.taken:
            with pytest.raises(RuntimeError, match="taken already"):
                self.memory.take(num_bytes)
            return
        has_room = size * self.num_lanes <= Driver.room
        with contextlib.nullcontext() if has_room else pytest.raises(torch.OutOfMemoryError):
            lanes = self.memory.take(num_bytes)
        if has_room:
            self.taken = size * self.num_lanes
            assert [lane["shape"] for lane in lanes] == [(num_bytes,)] * self.num_lanes
            addresses = [lane["data"][0] for lane in lanes]
            self.addresses = self.addresses or addresses
            assert addresses == self.addresses
            assert self.memory.last_bytes == self.taken

    @rule()
    def give_back(self):
        self.memory.give_back()
        self.taken = 0

    @invariant()
    def held_is_what_is_mapped(self):
        if hasattr(self, "memory"):
            assert self.memory.num_bytes == self.taken == sum(self.memory._driver.mapped.values())

    def teardown(self):
        if hasattr(self, "memory"):
            driver = self.memory._driver
            del self.memory
            assert not driver.mapped
            self.patch.undo()


TestLanes = Lanes.TestCase
TestLanes.settings = settings(proved, stateful_step_count=25)


def test_passing_lanes_are_each_of_their_own():
    memory = PassingMemory(torch.device("cpu"), num_lanes=3)
    first, second = memory.take(64), memory.take(32)
    assert len({lane.data_ptr() for lane in first + second}) == 6
