"""Copies of recurrent states at block boundaries: which slot holds which, and which goes first."""

from __future__ import annotations

from collections import OrderedDict


class Snapshots:
    """Least recently used first. Slots are numbered from `first_slot`; content is not touched."""

    def __init__(self, first_slot: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._first_slot = first_slot
        self._free = list(range(first_slot + num_slots - 1, first_slot - 1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()

    @property
    def num_used(self) -> int:
        """Slots that hold a snapshot."""
        return len(self._slot_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def use(self, key: bytes) -> int:
        """The slot to copy a snapshot from."""
        self._slot_of.move_to_end(key)
        return self._slot_of[key]

    def take(self, key: bytes, instead_of: bytes | None = None) -> int:
        """A slot to copy a state into; `instead_of`, if still there, gives its place first.

        There must be slots at all.
        """
        assert key not in self._slot_of, "a snapshot is taken twice"
        if instead_of is not None and instead_of in self._slot_of:
            slot = self._slot_of.pop(instead_of)
        elif self._free:
            slot = self._free.pop()
        else:
            slot = self._slot_of.popitem(last=False)[1]
        self._slot_of[key] = slot
        return slot

    def discard(self, slot: int) -> None:
        """What a slot was to hold never came: nobody may find it."""
        for key, held in self._slot_of.items():
            if held == slot:
                self.forget(key)
                return

    def forget(self, key: bytes) -> None:
        """A snapshot may not be found any more."""
        if key in self._slot_of:
            self._free.append(self._slot_of.pop(key))

    def check_invariants(self) -> None:
        """Every slot is free or holds one snapshot."""
        slots = [*self._free, *self._slot_of.values()]
        assert sorted(slots) == list(range(self._first_slot, self._first_slot + self.num_slots))
