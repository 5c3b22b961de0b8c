"""The split of layers over stages, against every possible split."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from shards.partition import layer_ranges_text, parse_stage_layers, partition_layers


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


def test_ranges_are_read_as_they_are_written() -> None:
    """Every split of up to six layers, with single layers in both spellings."""
    for num_layers in range(1, 7):
        for count in range(num_layers):
            for cuts in combinations(range(1, num_layers), count):
                stages = list(pairwise((0, *cuts, num_layers)))
                owned = [list(range(first, end)) for first, end in stages]
                long = ", ".join(f"{layers[0]} - {layers[-1]}" for layers in owned)
                short = ",".join(
                    f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
                    for layers in owned
                )
                assert list(parse_stage_layers(long)) == stages
                assert list(parse_stage_layers(short)) == stages
                assert parse_stage_layers(layer_ranges_text(tuple(stages))) == tuple(stages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "such as 0-8"),
        ("0-3,", "such as 0-8"),
        ("0-3,a-5", "such as 0-8"),
        ("0-3-5", "such as 0-8"),
        ("-1-3", "such as 0-8"),
        ("0-٣", "such as 0-8"),
        ("1-3", "1-3 does not begin with 0"),
        ("0-3,5-7", "5-7 does not begin with 4"),
        ("0-3,3-7", "3-7 does not begin with 4"),
        ("4-7,0-3", "4-7 does not begin with 0"),
        ("0-3,4-2", "not empty; 4-2"),
    ],
)
def test_other_ranges_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_stage_layers(text)
