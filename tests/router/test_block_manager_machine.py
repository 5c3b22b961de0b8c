"""The block manager against lists: who holds what, what is free since when, what can be found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.block_manager import NO_BLOCK, BlockManager
from tests.router.machines import Machine, drive, every_length

KEYS = [bytes([number]) for number in range(10)]

some_keys = st.lists(st.sampled_from(KEYS), max_size=8)
indices = st.integers(0, 10**6)


class BlockManagerMachine(Machine):
    """`tables` are the holders, `free` is in order of release, `content` names what blocks hold."""

    @initialize(num_blocks=st.integers(1, 12))
    def create(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, block_size=4)
        self.tables: list[list[int]] = []
        self.free = list(range(num_blocks))
        self.content: dict[int, bytes] = {}

    @property
    def held(self) -> list[int]:
        return [block for table in self.tables for block in table]

    def release(self, blocks: list[int]) -> None:
        """Call after the tables have lost these holds, one by one in this order."""
        held = Counter(self.held)
        left = Counter(blocks)
        for block in blocks:
            left[block] -= 1
            if not held[block] and not left[block]:
                self.free.append(block)

    @rule(num=st.integers(0, 5))
    def allocate(self, num: int) -> None:
        if num > len(self.free):
            with pytest.raises(MemoryError, match=f"{len(self.free)} of"):
                self.manager.allocate(num)
            return
        expected, self.free = self.free[:num], self.free[num:]
        for block in expected:
            self.content.pop(block, None)
        assert self.manager.allocate(num) == expected
        self.tables.append(expected)

    @precondition(lambda self: self.held)
    @rule(which=indices, key=st.sampled_from(KEYS))
    def publish(self, which: int, key: bytes) -> None:
        block = self.held[which % len(self.held)]
        self.manager.publish(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @precondition(lambda self: self.free)
    @rule(which=indices)
    def publish_what_nobody_holds(self, which: int) -> None:
        with pytest.raises(AssertionError, match="without a holder"):
            self.manager.publish(self.free[which % len(self.free)], b"unseen")

    def expected(self, keys: list[bytes], reach: int) -> list[int]:
        """Every beginning is tried, the longest first."""
        block_of = {key: block for block, key in self.content.items()}
        for length in range(len(keys), 0, -1):
            behind = max(0, length - reach)
            needed = keys[behind:length]
            if all(key in block_of for key in needed):
                return [NO_BLOCK] * behind + [block_of[key] for key in needed]
        return []

    @rule(keys=some_keys, reach=st.none() | st.integers(1, 4))
    def find_and_hold(self, keys: list[bytes], reach: int | None) -> None:
        found = self.manager.find(keys, reach)
        assert found == self.expected(keys, reach or len(keys))
        blocks = [block for block in found if block != NO_BLOCK]
        self.manager.hold(blocks)
        self.tables.append(blocks)
        self.free = [block for block in self.free if block not in blocks]

    @precondition(lambda self: self.tables)
    @rule(which=indices, order=st.permutations(range(12)), num=st.integers(1, 12))
    def free_some(self, which: int, order: list[int], num: int) -> None:
        """Some blocks of one holder, in any order."""
        table = self.tables[which % len(self.tables)]
        places = [place for place in order if place < len(table)][:num]
        blocks = [table[place] for place in places]
        table[:] = [block for place, block in enumerate(table) if place not in places]
        self.manager.free(blocks)
        self.release(blocks)

    @precondition(lambda self: self.free)
    @rule(which=indices)
    def free_what_nobody_holds(self, which: int) -> None:
        with pytest.raises(ValueError, match="freed twice"):
            self.manager.free([self.free[which % len(self.free)]])

    @rule(members=st.sets(st.integers(0, 6)))
    def ask_what_would_be_idle(self, members: set[int]) -> None:
        given = [table for place, table in enumerate(self.tables) if place in members]
        kept = [table for place, table in enumerate(self.tables) if place not in members]
        given_up = Counter(block for table in given for block in table)
        still_held = {block for table in kept for block in table}
        assert self.manager.idle_after(given_up) == given_up.keys() - still_held

    def check(self) -> None:
        manager = self.manager
        manager.check_invariants(self.held)
        assert manager.num_free == len(self.free)
        assert manager.num_used == len(set(self.held)) == manager.num_blocks - len(self.free)
        assert manager.num_cached == len(self.content)
        for block in range(manager.num_blocks):
            assert manager.is_free(block) == (block in self.free)
        for key in KEYS:
            assert manager.find([key]) == self.expected([key], 1)

    def finish(self) -> None:
        """Everything can be given back; then all blocks come in the order of their release."""
        for table in self.tables:
            blocks = table.copy()
            table.clear()
            self.manager.free(blocks)
            self.release(blocks)
        assert self.manager.num_used == 0
        assert self.manager.allocate(self.manager.num_blocks) == self.free
        assert self.manager.num_cached == 0


@every_length
def test_block_manager_agrees_with_lists(num_operations: int) -> None:
    drive(BlockManagerMachine, num_operations)
