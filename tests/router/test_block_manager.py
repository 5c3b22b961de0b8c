from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.block_manager import BlockManager


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(num_blocks=8, block_size=4).blocks_for(num_tokens) == num_blocks


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 13)), max_size=40))
def test_every_block_has_one_owner(num_blocks: int, actions: list[tuple[bool, int]]) -> None:
    manager = BlockManager(num_blocks, block_size=4)
    held: list[int] = []
    for allocate, num in actions:
        if not allocate:
            manager.free(held[:num])
            del held[:num]
        elif num > num_blocks - len(held):
            with pytest.raises(MemoryError):
                manager.allocate(num)
        else:
            got = manager.allocate(num)
            assert len(got) == num
            held += got
        manager.check_invariants()
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert (manager.num_used, manager.num_free) == (len(held), num_blocks - len(held))


def test_longest_free_block_is_used_first() -> None:
    manager = BlockManager(num_blocks=4, block_size=1)
    assert manager.allocate(4) == [0, 1, 2, 3]
    manager.free([2])
    manager.free([0])
    manager.free([3])
    assert manager.allocate(3) == [2, 0, 3]


def test_double_free_is_refused() -> None:
    manager = BlockManager(num_blocks=2, block_size=1)
    (block,) = manager.allocate(1)
    manager.free([block])
    with pytest.raises(ValueError, match="freed twice"):
        manager.free([block])
    manager.check_invariants()
