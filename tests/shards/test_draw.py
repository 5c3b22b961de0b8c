"""The draw itself, at numbers of the test's choosing, and the numbers that it gets in service."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.step import SamplingParams
from shards.draw import draw, uniform
from tests.shards import sampling_oracle as oracle

LAST = 1 - 2**-53
"""The greatest random number that there is."""


def drawn(row: oracle.Row, number: float, **fields: Any) -> int:
    sampling = SamplingParams(max_tokens=1, **fields)
    return int(draw([row], row.max(keepdims=True), [sampling], [number])[0])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from((2, 40, 511, 512, 513, 1300)),
    st.integers(0, 2**32),
    st.sampled_from(({}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.9})),
)
def test_the_ends_of_the_numbers_are_the_ends_of_what_is_kept(
    vocab: int, seed: int, fields: dict[str, Any]
) -> None:
    row = np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)
    row[seed % vocab] = -np.inf  # what must not be drawn, often at an end
    kept = oracle.distribution(row.tolist(), SamplingParams(max_tokens=1, **fields))
    possible = [i for i, weight in kept.items() if weight > 0]
    assert drawn(row, 0.0, **fields) == possible[0]
    assert drawn(row, LAST, **fields) == possible[-1]


@pytest.mark.parametrize("vocab", [16, 512, 4096])
@pytest.mark.parametrize("wanted", [1, 2, 5, 16])
def test_top_p_keeps_as_many_as_reach_it(vocab: int, wanted: int) -> None:
    row = np.full(vocab, 3.5, np.float32)  # weights of exactly 1
    assert drawn(row, LAST, top_p=wanted / vocab) == wanted - 1
    assert drawn(row, LAST, top_p=math.nextafter(wanted / vocab, 1.0)) == min(wanted, vocab - 1)
    assert drawn(row, LAST, top_k=min(16, vocab), top_p=wanted / 16) == wanted - 1
    assert drawn(row, LAST, top_k=8, top_p=wanted / 16) == (wanted + 1) // 2 - 1


def test_numbers_depend_on_seed_sample_and_position_alone() -> None:
    numbers = {uniform(s, i, p) for s in (0, 1, 2**64 - 1) for i in (0, 1) for p in range(50)}
    assert len(numbers) == 300
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert 0.4 < sum(uniform(7, 0, p) for p in range(2000)) / 2000 < 0.6
    reference = np.random.Generator(
        np.random.Philox(key=np.array([5, 6], np.uint64), counter=np.array([7, 0, 0, 0], np.uint64))
    )
    assert uniform(5, 6, 7) == reference.random()
