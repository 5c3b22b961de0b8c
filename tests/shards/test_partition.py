"""The split of layers over stages, against every possible split."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from shards.partition import partition_layers


def brute_force(costs: list[int], num_stages: int) -> int:
    splits = combinations(range(1, len(costs)), num_stages - 1)
    return min(max(sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs)))) for cuts in splits)


def test_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(300):
        costs = [rng.choice((0, 1, 2, 3, 10, 100)) for _ in range(rng.randint(1, 9))]
        num_stages = rng.randint(1, len(costs))
        stages = partition_layers(costs, num_stages)
        assert len(stages) == num_stages
        assert [layer for first, last in stages for layer in range(first, last)] == list(
            range(len(costs))
        )
        assert all(first < last for first, last in stages)
        assert max(sum(costs[a:b]) for a, b in stages) == brute_force(costs, num_stages)


def test_known_splits() -> None:
    assert partition_layers([1, 1, 1, 1], 2) == ((0, 2), (2, 4))
    assert partition_layers([9, 1, 1, 1], 2) == ((0, 1), (1, 4))
    assert partition_layers([5], 1) == ((0, 1),)


@pytest.mark.parametrize("num_stages", [0, -1, 4])
def test_impossible_counts_are_named(num_stages: int) -> None:
    with pytest.raises(ValueError, match=rf"stages={num_stages}: allowed 1\.\.3 for 3 layers"):
        partition_layers([1, 2, 3], num_stages)


def test_no_layers() -> None:
    with pytest.raises(ValueError, match=r"allowed 1\.\.0"):
        partition_layers([], 1)
