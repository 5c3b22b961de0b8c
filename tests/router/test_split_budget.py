"""How prefills share a step's tokens, and which limits make no engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.scheduler import EngineLimits, split_budget, worth_starting


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 80))
def test_split_budget_wastes_nothing_and_forgets_nobody(needs: list[int], spare: int) -> None:
    budget = len(needs) + spare
    chunks = split_budget(budget, needs)
    assert sum(chunks) == min(budget, sum(needs))
    assert all(1 <= chunk <= need for chunk, need in zip(chunks, needs, strict=True))
    if needs:
        assert chunks[0] >= min(needs[0], budget // 2, spare + 1)


@pytest.mark.parametrize(
    ("budget", "needs", "chunks"),
    [
        (10, [], []),
        (10, [100], [10]),
        (10, [100, 2], [8, 2]),
        (10, [100, 100], [5, 5]),
        (10, [100, 100, 2], [5, 3, 2]),
        (3, [9, 9, 9], [1, 1, 1]),
        (10, [1, 100], [1, 9]),
    ],
)
def test_split_budget(budget: int, needs: list[int], chunks: list[int]) -> None:
    assert split_budget(budget, needs) == chunks


@pytest.mark.parametrize(
    ("budget", "needs", "need", "worth"),
    [
        (1, [], 50, True),
        (10, [], 50, True),
        (10, [100], 50, True),
        (10, [100, 50], 60, False),
        (10, [100, 50], 3, True),
        (10, [100, 5], 6, False),
        (10, [3, 3], 4, True),
        (2, [100, 100], 1, False),
    ],
)
def test_a_prefill_is_worth_starting_when_it_would_advance(
    budget: int, needs: list[int], need: int, worth: bool
) -> None:
    assert worth_starting(budget, needs, need) == worth


ALLOWED = {
    "block_size": 1,
    "num_blocks": 1,
    "num_state_slots": 0,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": 2,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("num_blocks", 0),
        ("num_state_slots", -1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 1),
        ("reprefill_length", 0),
        ("max_in_flight", 0),
    ],
)
def test_impossible_limits_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}: allowed"):
        EngineLimits(**{**ALLOWED, name: value})


@pytest.mark.parametrize(
    ("fields", "num_seats"),
    [
        ({}, 8),
        ({"max_num_batched_tokens": 3}, 3),
        ({"max_num_batched_tokens": 3, "max_in_flight": 2}, 6),
        ({"num_state_slots": 5}, 5),
    ],
)
def test_no_more_run_than_the_steps_have_tokens_and_slots(
    fields: dict[str, int], num_seats: int
) -> None:
    roomy = {**ALLOWED, "max_num_seqs": 8, "max_num_batched_tokens": 64, **fields}
    assert EngineLimits(**roomy).num_seats == num_seats
