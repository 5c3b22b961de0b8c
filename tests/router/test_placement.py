"""`place_experts` against its own promises, over every small size."""

from __future__ import annotations

from itertools import pairwise

import pytest

from router.placement import Placement, place_experts

SIZES = [(e, s, r) for e in range(1, 10) for s in range(1, 30) for r in range(1, 6)]


def is_possible(num_experts: int, num_shards: int, num_replicas: int) -> bool:
    return num_replicas <= num_shards <= num_experts * num_replicas


def test_every_possible_small_size() -> None:
    for size in SIZES:
        if not is_possible(*size):
            continue
        num_experts, num_shards, num_replicas = size
        placement = place_experts(*size)
        assert placement.num_shards == num_shards, size
        assert len(placement.shards) == num_experts, size
        for holders in placement.shards:
            assert len(holders) == len(set(holders)) == num_replicas, size
            assert all(0 <= shard < num_shards for shard in holders), size
            gaps = [b - a for a, b in pairwise(holders)]
            assert all(gap >= num_shards // num_replicas for gap in gaps), size
        sizes = [len(placement.held_by(shard)) for shard in range(num_shards)]
        assert min(sizes) >= 1, size
        assert max(sizes) - min(sizes) <= 1, size
        preferred = [holders[0] for holders in placement.shards]
        assert preferred == sorted(preferred), size  # contiguous runs


def test_every_impossible_small_size_is_refused() -> None:
    for size in SIZES:
        if not is_possible(*size):
            with pytest.raises(ValueError, match="allowed"):
                place_experts(*size)


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1), (4, 0, 1), (4, 2, 0), (4, 2, 3), (4, 5, 1), (-1, 1, 1)]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        place_experts(*sizes)


def test_held_by_lists_experts_ascending() -> None:
    placement = Placement(num_shards=2, shards=((1, 0), (0,), (1,)))
    assert placement.held_by(0) == (0, 1)
    assert placement.held_by(1) == (0, 2)
