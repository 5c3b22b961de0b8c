"""The greedy kernel against a plain search; a row that is not finite has no greatest value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels.greedy import greatest_or_none
from tests.models.built import VARIANTS, needs_kernels
from tests.models.test_native_rows import dtypes, randn, same_threads, seeds

__all__ = ["same_threads"]


@needs_kernels
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(VARIANTS),
    dtypes,
    st.sampled_from([1, 2, 5, 40]),
    st.sampled_from([1, 7, 16, 17, 33, 100, 2049]),
    seeds,
)
def test_greatest(variant: str, dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    # Rounded, so that the greatest value is there several times: the first of them counts.
    logits = (randn(seed, rows, width) - 3 * (seed % 2)).mul(4).round().to(dtype)
    torch.set_num_threads(2)
    values = logits.tolist()
    assert greatest_or_none(variant, logits) == [row.index(max(row)) for row in values]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at", [0, 15, 16, 32, 36])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(variant: str, at: int, value: float) -> None:
    logits = torch.zeros(3, 37)
    logits[1, at] = value
    assert greatest_or_none(variant, logits) == [0, None, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_greatest_finite_numbers(variant: str) -> None:
    """Their sum would overflow."""
    most = torch.finfo(torch.float32).max
    assert greatest_or_none(variant, torch.full((1, 40), most)) == [0]
    assert greatest_or_none(variant, torch.full((1, 40), -most)) == [0]
