"""State slots and snapshots against a set and a list in order of use."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.snapshots import Snapshots
from router.state_slots import StateSlots
from tests.router.machines import Machine, drive, every_length

KEYS = [bytes([number]) for number in range(8)]
keys = st.sampled_from(KEYS)
indices = st.integers(0, 10**6)


class SlotsMachine(Machine):
    """`held` are sequences' slots; `kept` are snapshots with theirs, least recently used first."""

    @initialize(num_slots=st.integers(0, 5), num_snapshots=st.integers(0, 5))
    def create(self, num_slots: int, num_snapshots: int) -> None:
        self.slots = StateSlots(num_slots)
        self.snapshots = Snapshots(num_slots, num_snapshots)
        self.held: list[int] = []
        self.kept: list[tuple[bytes, int]] = []

    @property
    def kept_keys(self) -> list[bytes]:
        return [key for key, _ in self.kept]

    @rule()
    def allocate(self) -> None:
        if len(self.held) == self.slots.num_slots:
            with pytest.raises(MemoryError, match=f"all {self.slots.num_slots} state slots"):
                self.slots.allocate()
            return
        slot = self.slots.allocate()
        assert 0 <= slot < self.slots.num_slots
        assert slot not in self.held
        self.held.append(slot)

    @precondition(lambda self: self.held)
    @rule(which=indices)
    def free(self, which: int) -> None:
        self.slots.free(self.held.pop(which % len(self.held)))

    @rule(slot=st.integers(-2, 7))
    def free_what_nobody_holds(self, slot: int) -> None:
        if slot not in self.held:
            with pytest.raises(ValueError, match="not in use"):
                self.slots.free(slot)

    @precondition(lambda self: self.snapshots.num_slots)
    @rule(key=keys, instead_of=st.none() | keys)
    def take(self, key: bytes, instead_of: bytes | None) -> None:
        if key in self.kept_keys:
            with pytest.raises(AssertionError, match="taken twice"):
                self.snapshots.take(key, instead_of)
            return
        slot = self.snapshots.take(key, instead_of)
        if instead_of in self.kept_keys:
            expected = self.kept.pop(self.kept_keys.index(instead_of))[1]
            assert slot == expected
        elif len(self.kept) == self.snapshots.num_slots:
            assert slot == self.kept.pop(0)[1]
        first = self.slots.num_slots
        assert first <= slot < first + self.snapshots.num_slots
        assert slot not in [other for _, other in self.kept], "two snapshots in one slot"
        self.kept.append((key, slot))

    @rule(slot=st.integers(0, 10))
    def discard(self, slot: int) -> None:
        self.snapshots.discard(slot)
        self.kept = [entry for entry in self.kept if entry[1] != slot]

    @precondition(lambda self: self.kept)
    @rule(which=indices)
    def use(self, which: int) -> None:
        entry = self.kept.pop(which % len(self.kept))
        self.kept.append(entry)
        assert self.snapshots.use(entry[0]) == entry[1]

    @rule(key=keys)
    def use_what_is_not_there(self, key: bytes) -> None:
        if key not in self.kept_keys:
            with pytest.raises(KeyError):
                self.snapshots.use(key)

    def check(self) -> None:
        self.slots.check_invariants()
        self.snapshots.check_invariants()
        assert self.slots.num_used == len(self.held)
        assert self.slots.num_free == self.slots.num_slots - len(self.held)
        assert self.snapshots.num_used == len(self.kept)
        assert {key for key in KEYS if key in self.snapshots} == set(self.kept_keys)

    def finish(self) -> None:
        """The order of use decides who goes, to the last one."""
        for number in range(self.snapshots.num_slots - len(self.kept)):
            self.kept.append((bytes([99, number]), self.snapshots.take(bytes([99, number]))))
        for number, (key, slot) in enumerate(self.kept):
            assert self.snapshots.take(bytes([100, number])) == slot
            assert key not in self.snapshots
        for slot in self.held:
            self.slots.free(slot)
        assert self.slots.num_used == 0


@every_length
def test_slots_and_snapshots_agree_with_a_list(num_operations: int) -> None:
    drive(SlotsMachine, num_operations)
