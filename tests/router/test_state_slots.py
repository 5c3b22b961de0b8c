from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.state_slots import StateSlots


@given(st.integers(0, 5), st.lists(st.booleans(), max_size=40))
def test_every_slot_has_one_owner(num_slots: int, allocates: list[bool]) -> None:
    slots = StateSlots(num_slots)
    held: set[int] = set()
    for allocate in allocates:
        if allocate and len(held) == num_slots:
            with pytest.raises(MemoryError):
                slots.allocate()
        elif allocate:
            slot = slots.allocate()
            assert slot not in held
            assert 0 <= slot < num_slots
            held.add(slot)
        elif held:
            slots.free(held.pop())
        slots.check_invariants()
        assert (slots.num_used, slots.num_free) == (len(held), num_slots - len(held))


@pytest.mark.parametrize("slot", [-1, 1, 2])
def test_a_slot_not_in_use_cannot_be_freed(slot: int) -> None:
    slots = StateSlots(2)
    assert slots.allocate() == 0
    with pytest.raises(ValueError, match="not in use"):
        slots.free(slot)
