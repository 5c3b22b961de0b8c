"""Which recurrent-state slots are free."""

from __future__ import annotations


class StateSlots:
    """Hands out slots that hold one sequence's recurrent state each; content is not touched."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(reversed(range(num_slots)))

    @property
    def num_free(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that a sequence holds."""
        return self.num_slots - len(self._free)

    def allocate(self) -> int:
        """A slot with whatever its last owner left in it. Raises MemoryError when none is free."""
        if not self._free:
            raise MemoryError(f"all {self.num_slots} state slots are in use")
        return self._free.pop()

    def free(self, slot: int) -> None:
        """Take `slot` back. Raises ValueError when it is not in use."""
        if not 0 <= slot < self.num_slots or slot in self._free:
            raise ValueError(f"state slot {slot} is not in use")
        self._free.append(slot)

    def check_invariants(self) -> None:
        """Every free slot exists and is listed once."""
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert set(self._free) <= set(range(self.num_slots)), "a free slot does not exist"
