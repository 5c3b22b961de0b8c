"""Copies of recurrent states at block boundaries: which slot holds which, and which goes first."""

from __future__ import annotations

from collections import OrderedDict


class Snapshots:
    """Least recently used first. Slots are numbered from `first_slot`; content is not touched.

    A snapshot used by the step that is being planned is pinned: the step reads it before any
    other may overwrite it.
    """

    def __init__(self, first_slot: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._first_slot = first_slot
        self._free = list(range(first_slot + num_slots - 1, first_slot - 1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        self._pinned: set[bytes] = set()

    @property
    def num_used(self) -> int:
        """Slots that hold a snapshot."""
        return len(self._slot_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def use(self, key: bytes) -> int:
        """The slot to copy a snapshot from, in the step being planned."""
        self._slot_of.move_to_end(key)
        self._pinned.add(key)
        return self._slot_of[key]

    def take(self, key: bytes, instead_of: bytes | None = None) -> int | None:
        """A slot to copy a state into, in the step being planned; None when there is none to have.

        The snapshot `instead_of`, if it is still there, gives its place first.
        """
        assert key not in self._slot_of, "a snapshot is taken twice"
        slot = self._vacate(instead_of)
        if slot is None:
            return None
        self._slot_of[key] = slot
        self._pinned.add(key)
        return slot

    def _vacate(self, instead_of: bytes | None) -> int | None:
        if instead_of in self._slot_of and instead_of not in self._pinned:
            assert instead_of is not None
            return self._slot_of.pop(instead_of)
        if self._free:
            return self._free.pop()
        oldest = next((key for key in self._slot_of if key not in self._pinned), None)
        return None if oldest is None else self._slot_of.pop(oldest)

    def unpin(self) -> None:
        """The planned step is on its way."""
        self._pinned.clear()

    def check_invariants(self) -> None:
        """Every slot is free or holds one snapshot."""
        slots = [*self._free, *self._slot_of.values()]
        assert sorted(slots) == list(range(self._first_slot, self._first_slot + self.num_slots))
        assert self._pinned <= self._slot_of.keys(), "a pinned snapshot is gone"
